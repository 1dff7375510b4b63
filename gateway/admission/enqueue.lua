-- Stand in line, and be granted at once when there is room. Safe to repeat.
-- Returns {1 granted | 0 waiting | -1 refused, workers are there, ids granted to this gateway}.

local id, prefill, decode = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])
local patience, tenant = tonumber(ARGV[8]), ARGV[9]
local band, max_waiting = tonumber(ARGV[10]), tonumber(ARGV[11])

reap()
local state = 1
if redis.call('ZSCORE', leases, id) then
  redis.call('ZADD', leases, now + lease, id)
else
  redis.call('HSET', tickets, id, cmsgpack.pack({me, prefill, decode, now + patience, tenant}))
  local fresh = not redis.call('ZSCORE', waiting, id)
  if fresh then
    book.arrivals = book.arrivals + 1
    redis.call('ZADD', waiting, band * 2 ^ 48 + book.arrivals, id)
  end
  grant()
  if not redis.call('ZSCORE', leases, id) then
    state = 0
    if fresh and redis.call('ZCARD', waiting) > max_waiting then
      -- Those that nobody waits for any more must not keep the living out.
      for _, other in ipairs(redis.call('ZRANGE', waiting, 0, AT_ONCE - 1)) do
        local packed = redis.call('HGET', tickets, other)
        if abandoned(packed and cmsgpack.unpack(packed)) then forget(other) end
      end
      if redis.call('ZCARD', waiting) > max_waiting then
        forget(id)
        state = -1
      end
    end
  end
end
save()
return {state, staffed() and 1 or 0, granted}
