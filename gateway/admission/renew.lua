-- A gateway is alive: it renews what it holds, claims what the server has forgotten, and asks
-- about what it waits for. Returns {workers are there, how many wait, ids granted, ids unknown}.

local held = tonumber(ARGV[5])
local first_waiting = 6 + held * 4

redis.call('SET', prefix .. 'gateway:' .. me, 1, 'PX', lease)
for i = 6, first_waiting - 1, 4 do
  local id = ARGV[i]
  if redis.call('ZSCORE', leases, id) then
    redis.call('ZADD', leases, now + lease, id)
  else
    forget(id)
    local ticket = {me, tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]), 0, ARGV[i + 3]}
    redis.call('HSET', tickets, id, cmsgpack.pack(ticket))
    hold(id, ticket)
  end
end
reap()
grant()
local unknown = {}
for i = first_waiting, #ARGV do
  if redis.call('ZSCORE', leases, ARGV[i]) then
    granted[#granted + 1] = ARGV[i]
  elseif not redis.call('ZSCORE', waiting, ARGV[i]) then
    unknown[#unknown + 1] = ARGV[i]
  end
end
save()
return {staffed() and 1 or 0, redis.call('ZCARD', waiting), granted, unknown}
