-- A worker goes; its offer goes with it, unless a later incarnation has taken its name.

local known = redis.call('HGET', credits, me)
if known and cmsgpack.unpack(known).incarnation == wish.incarnation then
  redis.call('HDEL', credits, me)
  redis.call('ZREM', prefix .. 'workers', me)
  redis.call('DEL', prefix .. 'worker:' .. me)
  recount()
  save()
  redis.call('PUBLISH', prefix .. 'nudges', me)
end
return 1
