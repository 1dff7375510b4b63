-- Stand in line, and be granted at once when there is room. Safe to repeat; somebody else who does
-- it takes the ticket over, at its place and with its lease, unless it is a former owner that says
-- so late.
-- Returns {report, 1 granted | 0 waiting | -1 the line is full | -2 the tenant is over its limit
-- | -3 somebody else's by now, milliseconds after which to come again, what is left to the tenant}.

local GRANTED, WAITING, FULL, LIMITED, TAKEN = 1, 0, -1, -2, -3
local id, visit, max_waiting = wish.id, wish.ticket.visit, wish.max_waiting

local function retry_after()
  return math.min(math.max(book.gap * redis.call('ZCARD', waiting) / 8, 1000), 30000)
end

local function take_over(ticket)
  if ticket.owner > wish.ticket.owner then return TAKEN end
  ticket.owner = wish.ticket.owner
  if redis.call('ZSCORE', leases, id) then
    redis.call('ZADD', leases, now + lease, id)
    if ticket.gateway ~= me or ticket.visit ~= visit then
      ticket.gateway, ticket.visit, ticket.epoch = me, visit, next_epoch()
      note(id, ticket)
    end
    granted[#granted + 1] = id
    granted[#granted + 1] = ticket.epoch
    return GRANTED
  end
  ticket.gateway, ticket.visit, ticket.gives_up = me, visit, now + wish.patience
  note(id, ticket)
  redis.call('ZADD', waiting, ticket.gives_up, id)
  return WAITING
end

-- Those that nobody waits for any more must not keep the living out.
local function still_full()
  if redis.call('ZCARD', waiting) <= max_waiting then return false end
  for _, other in ipairs(redis.call('ZRANGE', waiting, 0, AT_ONCE - 1)) do
    local ticket = ticket_of(other)
    if ticket and abandoned(ticket) then drop(other, ticket) end
  end
  return redis.call('ZCARD', waiting) > max_waiting
end

local function come_in(ticket)
  book.arrivals = book.arrivals + 1
  ticket.gateway, ticket.epoch = me, 0
  ticket.gives_up = now + wish.patience
  -- Tickets of one millisecond stay in the order in which they came.
  ticket.deadline = now + wish.deadline + book.arrivals % 1024 / 1024
  if redis.call('EXISTS', waiting) == 0 and not settling() and fits(ticket) then
    serve_at_once(ticket)
    let_in(id, ticket)
    return GRANTED
  end
  note(id, ticket)
  line_up(id, ticket)
  grant()
  if redis.call('ZSCORE', leases, id) then return GRANTED end
  if not wish.again and still_full() then
    forget(id, ticket)
    return FULL
  end
  return WAITING
end

reap()
local known, state, after = ticket_of(id), WAITING, 0
local ticket = known or wish.ticket
if known then
  state = take_over(known)
elseif not wish.again then
  after = must_wait(ticket)
end
if after > 0 then
  state = LIMITED
elseif not known then
  state = come_in(ticket)
  if state == FULL then
    after = retry_after()
  else
    count_in(id, ticket)
    charge(ticket, price(ticket))
  end
end
save()
return {report(), state, after, allowance(ticket)}
