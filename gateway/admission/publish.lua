-- A worker says that it is there and what it offers; whoever now has room is granted.
-- Returns 1, or 0 when a later incarnation has taken this worker's name.

local roster, record_key = KEYS[6], KEYS[7]
local incarnation, prefill, decode = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local record = ARGV[8]

local known = redis.call('HGET', credits, me)
if known then
  local offer = cmsgpack.unpack(known)
  if offer[4] > incarnation and offer[3] > now then return 0 end
end
redis.call('HSET', credits, me, cmsgpack.pack({prefill, decode, now + lease, incarnation}))
redis.call('ZADD', roster, now + lease, me)
redis.call('PEXPIRE', roster, lifetime)
local before = redis.call('GET', record_key)
redis.call('SET', record_key, record, 'PX', lease)
recount()
reap()
grant()
save()
if before ~= record then
  redis.call('PUBLISH', prefix .. 'nudges', me)
end
return 1
