-- In which order the waiting are served: by priority band; within a band by start-time fair
-- queueing over tenants, whose cost is a ticket's tokens over its tenant's weight; within a tenant
-- by deadline.
--
-- bands  ZSET  the bands in which somebody waits
-- order  ZSET  per band: tenant -> virtual start of its next ticket
-- past   ZSET  per band: tenant -> virtual finish of its last one, while that is ahead of the clock
-- line   ZSET  per band and tenant: id -> deadline
-- clock  a field of the book per band: virtual start of the ticket that was granted last

local ONE_IN = 8 -- that many grants, one goes to the lower bands in turn: none of them starves
local bands = prefix .. 'bands:' .. model

local function order_key(band)
  return prefix .. 'order:' .. band .. ':' .. model
end

local function past_key(band)
  return prefix .. 'past:' .. band .. ':' .. model
end

local function line_key(band, tenant)
  return prefix .. 'line:' .. band .. ':' .. #tenant .. ':' .. tenant .. ':' .. model
end

local function clock(band)
  return tonumber(redis.call('HGET', room, 'clock' .. band) or '0')
end

local function keep_place(ticket)
  keep(bands)
  keep(order_key(ticket.band))
  keep(past_key(ticket.band))
  keep(line_key(ticket.band, ticket.tenant))
end

local function cost(ticket)
  return ticket.decode / ticket.weight
end

-- Where a tenant goes on. One that comes back has not saved up what it did not use.
local function start_of(ticket)
  local standing = redis.call('ZSCORE', order_key(ticket.band), ticket.tenant)
  if standing then return tonumber(standing) end
  local past = redis.call('ZSCORE', past_key(ticket.band), ticket.tenant)
  return math.max(clock(ticket.band), tonumber(past or '0'))
end

local function stand(id, ticket, start)
  redis.call('ZADD', bands, ticket.band, ticket.band)
  redis.call('ZADD', order_key(ticket.band), start, ticket.tenant)
  redis.call('ZREM', past_key(ticket.band), ticket.tenant)
  redis.call('ZADD', line_key(ticket.band, ticket.tenant), ticket.deadline, id)
  redis.call('ZADD', waiting, ticket.gives_up, id)
  keep_place(ticket)
end

local function line_up(id, ticket)
  stand(id, ticket, start_of(ticket))
end

-- As if it had never been granted: its tenant is given back what it cost.
local function line_up_again(id, ticket)
  stand(id, ticket, start_of(ticket) - cost(ticket))
end

-- Out of the line; the tenant's next one begins at `start`.
local function step_out(id, ticket, start)
  local band, tenant = ticket.band, ticket.tenant
  redis.call('ZREM', waiting, id)
  if redis.call('ZREM', line_key(band, tenant), id) == 0 then return end
  if redis.call('EXISTS', line_key(band, tenant)) == 1 then
    redis.call('ZADD', order_key(band), start, tenant)
  else
    redis.call('ZREM', order_key(band), tenant)
    if start > clock(band) then
      redis.call('ZADD', past_key(band), start, tenant)
      keep(past_key(band))
    end
    if redis.call('EXISTS', order_key(band)) == 0 then
      redis.call('ZREM', bands, band)
    end
  end
end

local function give_up_place(id, ticket)
  step_out(id, ticket, start_of(ticket))
end

-- It is served: the clock goes on to its start. Returns its tenant's finish.
local function advance(ticket)
  local band, start = ticket.band, start_of(ticket)
  if start > clock(band) then
    redis.call('HSET', room, 'clock' .. band, start)
    redis.call('ZREMRANGEBYSCORE', past_key(band), '-inf', start)
  end
  return start + cost(ticket)
end

local function serve(id, ticket)
  step_out(id, ticket, advance(ticket))
end

-- The same, when nobody waits and it need not stand in line.
local function serve_at_once(ticket)
  redis.call('ZADD', past_key(ticket.band), advance(ticket), ticket.tenant)
  keep(past_key(ticket.band))
end

local function next_band()
  local all = redis.call('ZRANGE', bands, 0, -1)
  if #all > 1 and book.grants % ONE_IN == ONE_IN - 1 then
    return all[2 + math.floor(book.grants / ONE_IN) % (#all - 1)]
  end
  return all[1]
end

-- Whose turn it is: id and ticket; nothing when nobody waits. What lapsed in part, while a server
-- was away for long, is cleared on the way: its gateways line up anew.
local function first()
  for _ = 1, AT_ONCE do
    local band = next_band()
    if not band then return nil end
    local tenant = redis.call('ZRANGE', order_key(band), 0, 0)[1]
    local id = tenant and redis.call('ZRANGE', line_key(band, tenant), 0, 0)[1]
    local ticket = id and ticket_of(id)
    if ticket then return id, ticket end
    if id then
      redis.call('ZREM', line_key(band, tenant), id)
    elseif tenant then
      redis.call('ZREM', order_key(band), tenant)
    else
      redis.call('ZREM', bands, band)
    end
  end
end
