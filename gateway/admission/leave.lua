-- Tickets that are over (served, failed or given up), and tickets whose prefill is done; then
-- grant what now has room. Safe to repeat. Returns ids granted to this gateway.

local over = tonumber(ARGV[5])

for i = 6, 5 + over do
  forget(ARGV[i])
end
for i = 6 + over, #ARGV do
  local packed = redis.call('HGET', tickets, ARGV[i])
  if packed and redis.call('ZSCORE', leases, ARGV[i]) then
    local ticket = cmsgpack.unpack(packed)
    book.held_prefill = book.held_prefill - ticket[2]
    ticket[2] = 0
    redis.call('HSET', tickets, ARGV[i], cmsgpack.pack(ticket))
  end
end
reap()
grant()
save()
return granted
