-- Room: what the workers offer, less what leases hold, and less what a worker has shown not to have.
--
-- credits  HASH  worker -> {prefill, decode, lapses, incarnation} and, after it refused a ticket
--                as full, {cut_prefill, cut_decode, step, pause, probe_at, probed}
--
-- A refusal cuts a worker's offer by all the room that seemed to be left; that of a worker which
-- offers nothing here is cut from all. The cut is taken back
-- step by step, each twice the last, so that a worker which is still full refuses one ticket and
-- not a crowd; each refusal after a step doubles the pause between steps.

local FIRST_PAUSE, LONGEST_PAUSE = 50, 1000

-- Give back a part of what was cut, when it is time.
local function probe(offer)
  if not offer.probe_at or now < offer.probe_at then return false end
  offer.cut_prefill = math.max(0, offer.cut_prefill - offer.step)
  offer.cut_decode = math.max(0, offer.cut_decode - offer.step)
  offer.step, offer.probed = 2 * offer.step, 1
  offer.probe_at = now + offer.pause
  if offer.cut_prefill + offer.cut_decode == 0 then
    offer.probe_at, offer.probed, offer.pause = nil, nil, nil
  end
  return true
end

-- Add up what the workers offer, without those that have not repeated their offer in time.
local function recount()
  book.offered_prefill, book.offered_decode, book.largest_prefill = 0, 0, 0
  book.recount_at = now + lifetime
  local prefills, decodes = false, false
  local offers = redis.call('HGETALL', credits)
  for i = 1, #offers, 2 do
    local offer = cmsgpack.unpack(offers[i + 1])
    local lapses = math.max(offer.lapses, book.grace_until)
    if lapses <= now then
      redis.call('HDEL', credits, offers[i])
    else
      if probe(offer) then
        redis.call('HSET', credits, offers[i], cmsgpack.pack(offer))
      end
      prefills, decodes = prefills or offer.prefill > 0, decodes or offer.decode > 0
      book.largest_prefill = math.max(book.largest_prefill, offer.prefill)
      book.offered_prefill = book.offered_prefill + offer.prefill - (offer.cut_prefill or 0)
      book.offered_decode = book.offered_decode + offer.decode - (offer.cut_decode or 0)
      book.recount_at = math.min(book.recount_at, lapses, offer.probe_at or lapses)
    end
  end
  book.staffed = (prefills and decodes) and 1 or 0
end

-- `worker` had no `kind` of room for a ticket that has given its lease back.
local function shrink(worker, kind, ticket)
  local packed, cut = redis.call('HGET', credits, worker), 'cut_' .. kind
  local offer = packed and cmsgpack.unpack(packed)
    or {prefill = 0, decode = 0, lapses = now + lease, incarnation = 0}
  local seemed = book['offered_' .. kind] - book['held_' .. kind]
  offer.cut_prefill, offer.cut_decode = offer.cut_prefill or 0, offer.cut_decode or 0
  offer[cut] = offer[cut] + math.max(seemed, 0)
  if offer.incarnation > 0 then
    offer[cut] = math.min(offer[kind], offer[cut])
  end
  offer.step = math.max(ticket[kind], 1)
  if offer.probed then
    offer.pause = math.min(2 * offer.pause, LONGEST_PAUSE)
  end
  offer.pause, offer.probed = offer.pause or FIRST_PAUSE, nil
  offer.probe_at = now + offer.pause
  book.shy_until = offer.probe_at
  redis.call('HSET', credits, worker, cmsgpack.pack(offer))
  recount()
end

-- A ticket larger than everything that is offered runs alone: it must not wait for ever.
local function fits(ticket)
  if book.staffed == 0 then return false end
  if claim(ticket) <= book.offered_prefill - book.held_prefill
    and ticket.decode <= book.offered_decode - book.held_decode then
    return true
  end
  return now >= book.shy_until and redis.call('EXISTS', leases) == 0
end

if now >= book.recount_at then
  recount()
end
