-- A gateway is alive: it renews what it holds, claims what the server has forgotten, and asks
-- about what it waits for. Returns {report, ids that are unknown, ids that others have taken over}.
-- wish.held: {id, epoch, ticket}; wish.waiting: ids

local unknown, lost = {}, {}

-- A right that the server has forgotten is as good as one that it knows; the later owner wins, and
-- for one owner the later epoch.
local function claim(id, epoch, ticket)
  local known = ticket_of(id)
  book.epoch = math.max(book.epoch, epoch)
  local overtaken = known and known.owner > ticket.owner
  local overtakes = known and known.owner < ticket.owner
  if overtaken or (known and not overtakes and known.gateway ~= me and known.epoch >= epoch) then
    lost[#lost + 1] = id
    return
  end
  if known and redis.call('ZSCORE', leases, id) then
    redis.call('ZADD', leases, now + lease, id)
    if overtakes or known.gateway ~= me or known.epoch < epoch then
      known.gateway, known.visit, known.epoch = me, ticket.visit, epoch
      known.owner = ticket.owner
      note(id, known)
    elseif known.epoch > epoch then
      tell(id, known)
    end
  else
    if known then give_up_place(id, known) end
    ticket.gateway, ticket.gives_up = me, now
    ticket.deadline = known and known.deadline or now
    hold(id, ticket, epoch)
  end
  count_in(id, ticket)
end

redis.call('SET', prefix .. 'gateway:' .. me, 1, 'PX', lease)
if wish.last then
  redis.call('ZADD', gateways, now, me)
end
redis.call('ZREMRANGEBYSCORE', gateways, '-inf', now - lifetime)
for _, item in ipairs(wish.held) do
  claim(item[1], item[2], item[3])
end
reap()
grant()
for _, id in ipairs(wish.waiting) do
  local ticket = ticket_of(id)
  if not ticket then
    unknown[#unknown + 1] = id
  elseif ticket.gateway ~= me then
    lost[#lost + 1] = id
  elseif redis.call('ZSCORE', leases, id) then
    tell(id, ticket)
  else
    count_in(id, ticket)
    keep_place(ticket)
  end
end
save()
return {report(), unknown, lost}
