-- A worker says that it is there and what it offers; whoever now has room is granted.
-- Returns 1, or 0 when a later incarnation has taken this worker's name.

local roster, record_key = prefix .. 'workers', prefix .. 'worker:' .. me

local record = ARGV[9]
local known = redis.call('HGET', credits, me)
local offer = known and cmsgpack.unpack(known) or {}
if known and offer.incarnation > wish.incarnation and offer.lapses > now then return 0 end
if offer.incarnation ~= wish.incarnation then
  offer = {incarnation = wish.incarnation}
end
offer.prefill, offer.decode, offer.lapses = wish.prefill, wish.decode, now + lease
redis.call('HSET', credits, me, cmsgpack.pack(offer))
redis.call('ZADD', roster, now + lease, me)
keep(roster)
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
