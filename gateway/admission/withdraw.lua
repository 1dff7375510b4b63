-- A worker goes; its offer goes with it, unless a later incarnation has taken its name.

local roster, record_key = KEYS[6], KEYS[7]

local known = redis.call('HGET', credits, me)
if known and cmsgpack.unpack(known)[4] == tonumber(ARGV[5]) then
  redis.call('HDEL', credits, me)
  redis.call('ZREM', roster, me)
  redis.call('DEL', record_key)
  recount()
  save()
  redis.call('PUBLISH', prefix .. 'nudges', me)
end
return 1
