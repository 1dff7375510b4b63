-- What the scripts of one model's queue share. A script first loads the book, works on it with the
-- functions below, and saves it once at its end.
--
-- waiting  ZSET  id -> priority band * 2^48 + order of arrival: the next one is the smallest
-- tickets  HASH  id -> {gateway, prefill tokens, decode tokens, time it gives up, tenant}
-- leases   ZSET  id -> time at which the granted ticket's lease lapses
-- room     HASH  the book: tokens held by leases, tokens that workers offer, a few times
-- credits  HASH  worker -> {prefill tokens, decode tokens, time they lapse, incarnation}
--
-- Times are milliseconds of the server's clock. Every key has a lifetime that each call renews.

local waiting, tickets, leases, room, credits = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local prefix, lifetime, lease, me = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local AT_ONCE = 256 -- a call that finds more to do leaves the rest to the next one

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

local FIELDS = {
  'held_prefill', 'held_decode', 'offered_prefill', 'offered_decode',
  'recount_at', 'touched_at', 'grace_until', 'arrivals',
}
local book = {}
for i, value in ipairs(redis.call('HMGET', room, unpack(FIELDS))) do
  book[FIELDS[i]] = tonumber(value or '0')
end

-- Gateways call at least every third of a lease. A longer silence means that the server was away:
-- nobody loses a lease before everybody had a full period to come back and claim theirs.
if now - book.touched_at > lease / 2 then
  book.grace_until = now + lease
end
book.touched_at = now

local granted, elsewhere = {}, {}

local function staffed()
  return book.offered_prefill > 0 and book.offered_decode > 0
end

-- Add up what the workers offer, without those that have not repeated their offer in time.
local function recount()
  book.offered_prefill, book.offered_decode = 0, 0
  book.recount_at = now + lifetime
  local offers = redis.call('HGETALL', credits)
  for i = 1, #offers, 2 do
    local offer = cmsgpack.unpack(offers[i + 1])
    local lapses = math.max(offer[3], book.grace_until)
    if lapses <= now then
      redis.call('HDEL', credits, offers[i])
    else
      book.offered_prefill = book.offered_prefill + offer[1]
      book.offered_decode = book.offered_decode + offer[2]
      book.recount_at = math.min(book.recount_at, lapses)
    end
  end
end

local function hold(id, ticket)
  redis.call('ZADD', leases, now + lease, id)
  book.held_prefill = book.held_prefill + ticket[2]
  book.held_decode = book.held_decode + ticket[3]
end

-- Strike a ticket out, wherever it stands.
local function forget(id)
  local packed = redis.call('HGET', tickets, id)
  redis.call('ZREM', waiting, id)
  if redis.call('ZREM', leases, id) == 1 and packed then
    local ticket = cmsgpack.unpack(packed)
    book.held_prefill = book.held_prefill - ticket[2]
    book.held_decode = book.held_decode - ticket[3]
  end
  if packed then
    redis.call('HDEL', tickets, id)
  end
end

local function reap()
  if now < book.grace_until then return end
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now, 'LIMIT', 0, AT_ONCE)) do
    forget(id)
  end
end

-- Nobody waits for this ticket any more.
local function abandoned(ticket)
  if not ticket or ticket[4] <= now then return true end
  if ticket[1] == me or now < book.grace_until then return false end
  return redis.call('EXISTS', prefix .. 'gateway:' .. ticket[1]) == 0
end

-- A ticket larger than everything that is offered runs alone: it must not wait for ever.
local function fits(ticket)
  if not staffed() then return false end
  if ticket[2] <= book.offered_prefill - book.held_prefill
    and ticket[3] <= book.offered_decode - book.held_decode then
    return true
  end
  return redis.call('EXISTS', leases) == 0
end

-- Grant strictly in order, so that a large ticket is not overtaken until it starves.
local function grant()
  for _ = 1, AT_ONCE do
    local id = redis.call('ZRANGE', waiting, 0, 0)[1]
    if not id then break end
    local packed = redis.call('HGET', tickets, id)
    local ticket = packed and cmsgpack.unpack(packed)
    if abandoned(ticket) then
      forget(id)
    elseif not fits(ticket) then
      break
    else
      redis.call('ZREM', waiting, id)
      hold(id, ticket)
      local gateway = ticket[1]
      if gateway == me then
        granted[#granted + 1] = id
      else
        elsewhere[gateway] = elsewhere[gateway] or {}
        table.insert(elsewhere[gateway], id)
      end
    end
  end
  for gateway, ids in pairs(elsewhere) do
    redis.call('PUBLISH', prefix .. 'grants:' .. gateway, cmsgpack.pack(ids))
  end
  elsewhere = {}
end

local function save()
  if redis.call('EXISTS', leases) == 0 then
    book.held_prefill, book.held_decode = 0, 0
  end
  local fields = {}
  for _, name in ipairs(FIELDS) do
    fields[#fields + 1] = name
    fields[#fields + 1] = book[name]
  end
  redis.call('HSET', room, unpack(fields))
  for i = 1, 5 do
    redis.call('PEXPIRE', KEYS[i], lifetime)
  end
end

if now >= book.recount_at then
  recount()
end
