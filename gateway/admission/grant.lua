-- Strike tickets out, and grant strictly in order, so that a large one is not overtaken until it
-- starves.

local granted, elsewhere = {}, {}

-- Strike a ticket out, wherever it stands.
local function forget(id, ticket)
  if not release(id, ticket) then
    give_up_place(id, ticket)
  end
  if ticket.concurrent > 0 then
    redis.call('SREM', active_key(ticket.tenant), id)
  end
  redis.call('HDEL', tickets, id)
end

-- Nobody waits for this ticket any more.
local function abandoned(ticket)
  if ticket.gives_up <= now then return true end
  if ticket.gateway == me or now < book.grace_until then return false end
  return redis.call('EXISTS', prefix .. 'gateway:' .. ticket.gateway) == 0
end

-- It never ran: what it was charged comes back.
local function drop(id, ticket)
  settle(ticket, 0)
  forget(id, ticket)
end

local function reap()
  if now >= book.grace_until then
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now, 'LIMIT', 0, AT_ONCE)) do
      local ticket = ticket_of(id)
      if ticket then forget(id, ticket) else redis.call('ZREM', leases, id) end
    end
  end
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', waiting, '-inf', now, 'LIMIT', 0, AT_ONCE)) do
    local ticket = ticket_of(id)
    if ticket then drop(id, ticket) else redis.call('ZREM', waiting, id) end
  end
end

local function tell(id, ticket)
  local list = granted
  if ticket.gateway ~= me then
    elsewhere[ticket.gateway] = elsewhere[ticket.gateway] or {}
    list = elsewhere[ticket.gateway]
  end
  list[#list + 1] = id
  list[#list + 1] = ticket.epoch
end

local function let_in(id, ticket)
  hold(id, ticket, next_epoch())
  tell(id, ticket)
  book.grants = book.grants + 1
  book.gap = book.gap + (math.min(now - book.granted_at, 10000) - book.gap) / 16
  book.granted_at = now
end

local function grant()
  if settling() then return end
  for _ = 1, AT_ONCE do
    local id, ticket = first()
    if not id then break end
    if abandoned(ticket) then
      drop(id, ticket)
    elseif not fits(ticket) then
      break
    else
      serve(id, ticket)
      let_in(id, ticket)
    end
  end
  for gateway, list in pairs(elsewhere) do
    redis.call('PUBLISH', prefix .. 'grants:' .. gateway, cmsgpack.pack(list))
  end
  elsewhere = {}
end

-- What every call brings home: workers are there, how many wait, in how many milliseconds to look
-- again (0: no need), and pairs of id and epoch that are granted to this gateway.
local function report()
  local depth, look = redis.call('ZCARD', waiting), 0
  if depth > 0 then
    local due = book.recount_at
    if book.settle_until > now then due = math.min(due, book.settle_until) end
    if due - now <= 1000 then look = math.max(1, due - now) end
  end
  return {book.staffed, depth, look, granted}
end
