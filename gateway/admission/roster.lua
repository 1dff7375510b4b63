-- The records of all workers that have been heard of in time.

local roster, prefix = KEYS[1], ARGV[1]
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

redis.call('ZREMRANGEBYSCORE', roster, '-inf', now)
local records = {}
for _, id in ipairs(redis.call('ZRANGE', roster, 0, 1023)) do
  local record = redis.call('GET', prefix .. 'worker:' .. id)
  if record then
    records[#records + 1] = record
  end
end
return records
