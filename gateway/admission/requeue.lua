-- A worker had no room for a granted ticket: that worker's credit shrinks, and the ticket goes back
-- to its place, unless this grant is not the current one any more. Safe to repeat.
-- Returns {report, 1 granted | 0 waiting}.

local id = wish.id
local ticket = ticket_of(id)
if ticket and ticket.gateway == me and ticket.epoch == wish.epoch and release(id, ticket) then
  ticket.prefill, ticket.gives_up = wish.prefill, now + wish.patience
  note(id, ticket)
  shrink(wish.worker, wish.kind, ticket)
  line_up_again(id, ticket)
end
reap()
grant()
save()
return {report(), redis.call('ZSCORE', leases, id) and 1 or 0}
