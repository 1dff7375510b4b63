-- The record of a request that its client may ask for again: one operation on one record.
--
-- record:ID   HASH    tenant, body (its digest), saved, owner (a gateway), epoch, expires, key, answer
-- records     ZSET    ID -> when it expires, so that they can be counted
-- again:KEY   STRING  ID of the request with this idempotency key of this tenant
--
-- Times are milliseconds of the server's clock. Returns {state, id, epoch, ms left, saved, answer}.

local prefix, me, wish = ARGV[1], ARGV[2], cmsgpack.unpack(ARGV[3])
local saved, answer = ARGV[4], ARGV[5]
local NEW, TAKEN, UNKNOWN, OTHER_BODY, FULL = 1, 2, 0, -1, -2
local index = KEYS[1]

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

local function name_of(id) return prefix .. 'record:' .. id end
local function again_of(key) return prefix .. 'again:' .. key end

local function live_for(id, key, lifetime)
  redis.call('PEXPIRE', name_of(id), lifetime)
  if key ~= '' then redis.call('SET', again_of(key), id, 'PX', lifetime) end
  redis.call('ZADD', index, now + lifetime, id)
  local longest = redis.call('ZRANGE', index, -1, -1, 'WITHSCORES')[2]
  redis.call('PEXPIRE', index, math.max(1, tonumber(longest) - now))
end

local function create(id, epoch)
  redis.call('ZREMRANGEBYSCORE', index, '-inf', now)
  if redis.call('ZCARD', index) >= wish.most then return {FULL} end
  redis.call('HSET', name_of(id), 'tenant', wish.tenant, 'body', wish.body, 'saved', saved,
    'owner', me, 'epoch', epoch, 'expires', now + wish.left, 'key', wish.key)
  live_for(id, wish.key, wish.lifetime)
  return {NEW, id, epoch, wish.left, '', ''}
end

local function mine(id)
  local found = redis.call('HMGET', name_of(id), 'owner', 'epoch', 'key')
  return found[1] == me and tonumber(found[2]) == wish.epoch, found[3]
end

-- Whoever asks last owns it. `floor` is an epoch that a worker has seen: ours may be forgotten.
local function take(id)
  local found = redis.call('HMGET', name_of(id), 'tenant', 'body', 'epoch', 'expires', 'saved',
    'answer')
  if found[1] ~= wish.tenant then return {UNKNOWN} end
  if wish.body ~= '' and wish.body ~= found[2] then return {OTHER_BODY} end
  local epoch = math.max(tonumber(found[3]), wish.floor) + 1
  redis.call('HSET', name_of(id), 'owner', me, 'epoch', epoch)
  return {TAKEN, id, epoch, tonumber(found[4]) - now, found[5], found[6] or ''}
end

if wish.op == 'open' then
  local known = wish.key ~= '' and redis.call('GET', again_of(wish.key))
  if known and redis.call('EXISTS', name_of(known)) == 1 then return take(known) end
  return create(wish.id, 1)
elseif wish.op == 'take' then
  return take(wish.id)
elseif wish.op == 'again' then
  return mine(wish.id) and take(wish.id) or {UNKNOWN}
elseif wish.op == 'claim' then -- the server may have forgotten it
  local epoch = redis.call('HGET', name_of(wish.id), 'epoch')
  if not epoch then return create(wish.id, wish.epoch) end
  if tonumber(epoch) < wish.epoch then
    redis.call('HSET', name_of(wish.id), 'owner', me, 'epoch', wish.epoch)
  end
  return {TAKEN}
end
local own, key = mine(wish.id)
if not own then return {UNKNOWN} end
if wish.op == 'settle' then
  redis.call('HSET', name_of(wish.id), 'answer', answer)
  live_for(wish.id, key, wish.lifetime)
else
  redis.call('DEL', name_of(wish.id))
  redis.call('ZREM', index, wish.id)
  if key ~= '' then redis.call('DEL', again_of(key)) end
end
return {TAKEN}
