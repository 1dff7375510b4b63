-- Tickets that are over (served, failed or given up), and tickets whose prefill is done; then
-- grant what now has room. Safe to repeat. A ticket that somebody has taken over is left
-- alone. Returns {report}.
-- wish.over: {id, visit, tokens generated}; wish.prefilled: {id, epoch}

for _, item in ipairs(wish.over) do
  local id, visit, generated = item[1], item[2], item[3]
  local ticket = ticket_of(id)
  if ticket and ticket.gateway == me and ticket.visit == visit then
    settle(ticket, generated)
    forget(id, ticket)
  end
end
for _, item in ipairs(wish.prefilled) do
  local id, epoch = item[1], item[2]
  local ticket = ticket_of(id)
  if ticket and ticket.gateway == me and ticket.epoch == epoch
    and redis.call('ZSCORE', leases, id) then
    book.held_prefill = book.held_prefill - ticket.claim
    ticket.prefill, ticket.claim = 0, 0
    note(id, ticket)
  end
end
reap()
grant()
save()
return {report()}
