-- What the scripts of one model's queue share: its clock, its book, its tickets and leases. A
-- script loads the book, works on it, and saves it once at its end; what must not be interleaved
-- is one script. Times are milliseconds of the server's clock. Every key has a lifetime, which is
-- renewed by the calls of those who need it.
--
-- room     HASH  the book: tokens that leases hold, tokens that workers offer, a few times
-- tickets  HASH  id -> ticket: the wish it came with, its gateway, epoch, deadline, and when it
--                gives up
-- waiting  ZSET  id -> time at which it gives up
-- leases   ZSET  id -> time at which the granted ticket's lease lapses
-- gateways ZSET  gateway -> when it was last heard of
-- active   SET   per tenant: ids of its tickets, where their number is limited
--
-- A right to run is a lease and its epoch. Epochs grow with the server's clock, so that they go
-- on growing when a server forgets its last writes; an actor with an older one is passed over.

local prefix, model, me, server = ARGV[1], ARGV[2], ARGV[5], ARGV[6]
local lifetime, lease = tonumber(ARGV[3]), tonumber(ARGV[4])
local former, wish = ARGV[7], cmsgpack.unpack(ARGV[8])
local AT_ONCE = 256 -- a call that finds more to do leaves the rest to the next one

local room, tickets = KEYS[1], prefix .. 'tickets:' .. model
local waiting, leases = prefix .. 'waiting:' .. model, prefix .. 'leases:' .. model
local gateways, credits = prefix .. 'gateways:' .. model, prefix .. 'credits:' .. model

local time = redis.call('TIME')
local now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])
local now = math.floor(now_us / 1000)

local FIELDS = {
  'held_prefill', 'held_decode', 'offered_prefill', 'offered_decode', 'largest_prefill', 'staffed',
  'recount_at', 'shy_until', 'touched_at', 'grace_until', 'settle_until', 'restarted_at',
  'alive_since', 'epoch', 'arrivals', 'grants', 'granted_at', 'gap',
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

-- A server that began anew may have forgotten its last second, or everything; callers say which
-- run of it they talk to, and to which they talked before. Nothing is granted until every gateway
-- that was alive has said what it holds, or had time to.
local served_by = redis.call('HGET', room, 'server')
if served_by ~= server then
  redis.call('HSET', room, 'server', server)
  if served_by or former ~= '' then
    book.grace_until = now + lease
    book.settle_until = now + lease / 2
    book.restarted_at, book.alive_since = now, math.max(0, book.touched_at - lease)
  end
end
book.touched_at = now

local function keep(key)
  redis.call('PEXPIRE', key, lifetime)
end

local function ticket_of(id)
  local packed = redis.call('HGET', tickets, id)
  return packed and cmsgpack.unpack(packed)
end

local function note(id, ticket)
  redis.call('HSET', tickets, id, cmsgpack.pack(ticket))
end

local function next_epoch()
  book.epoch = math.max(book.epoch + 1, now_us)
  return book.epoch
end

local function active_key(tenant)
  return prefix .. 'active:' .. tenant
end

local function count_in(id, ticket)
  if ticket.concurrent > 0 and ticket.counts > 0 then
    redis.call('SADD', active_key(ticket.tenant), id)
    keep(active_key(ticket.tenant))
  end
end

-- One worker computes a prompt: it claims no more room than one offers, however long it is, or it
-- would wait until all workers have run dry.
local function claim(ticket)
  if book.largest_prefill == 0 then return ticket.prefill end
  return math.min(ticket.prefill, book.largest_prefill)
end

local function hold(id, ticket, epoch)
  ticket.epoch, ticket.claim = epoch, claim(ticket)
  note(id, ticket)
  redis.call('ZADD', leases, now + lease, id)
  book.held_prefill = book.held_prefill + ticket.claim
  book.held_decode = book.held_decode + ticket.decode
end

-- Take a lease back; the ticket stays. True when there was one.
local function release(id, ticket)
  if redis.call('ZREM', leases, id) == 0 then return false end
  book.held_prefill = book.held_prefill - ticket.claim
  book.held_decode = book.held_decode - ticket.decode
  return true
end


local function settling()
  if now >= book.settle_until then return false end
  if book.alive_since == 0 then return true end
  local silent = redis.call('ZCOUNT', gateways, book.alive_since, '(' .. book.restarted_at)
  if silent > 0 then return true end
  book.settle_until = 0
  return false
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
  for _, key in ipairs({room, tickets, waiting, leases, gateways, credits}) do
    keep(key)
  end
end
