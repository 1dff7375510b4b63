-- What a tenant may use: a bucket per kind that holds a minute's worth and fills by itself.
--
-- quota  HASH  per tenant: what was left of `requests`, `prefill` and `decode` tokens at `at`
--
-- A bucket may be overdrawn: by an answer longer than expected, and by a ticket larger than a
-- minute's worth, which is let in when the bucket is full. The key lives until all are full again,
-- and without it they are.

local KINDS, MINUTE, EPSILON = {'requests', 'prefill', 'decode'}, 60000, 1e-6

local function quota_key(tenant)
  return prefix .. 'quota:' .. tenant
end

-- What is left now of each kind that is limited.
local function levels_of(ticket)
  if not ticket.limited then return {} end
  local saved = redis.call('HMGET', quota_key(ticket.tenant), 'at', unpack(KINDS))
  local levels, elapsed = {}, math.max(0, now - tonumber(saved[1] or now))
  for i, kind in ipairs(KINDS) do
    local limit = ticket.limits[kind]
    if limit > 0 then
      local level = tonumber(saved[i + 1] or limit)
      levels[kind] = math.min(limit, level + elapsed * limit / MINUTE)
    end
  end
  return levels
end

local function save_levels(ticket, levels)
  local key, full_in, any = quota_key(ticket.tenant), 0, false
  for kind, level in pairs(levels) do
    local limit = ticket.limits[kind]
    redis.call('HSET', key, 'at', now, kind, level)
    full_in, any = math.max(full_in, (limit - level) * MINUTE / limit), true
  end
  if any then
    redis.call('PEXPIRE', key, math.ceil(full_in) + 1000)
  end
end

local function charge(ticket, used)
  local levels = levels_of(ticket)
  for kind, level in pairs(levels) do
    levels[kind] = math.min(ticket.limits[kind], level - (used[kind] or 0))
  end
  save_levels(ticket, levels)
  return levels
end

local function price(ticket)
  return {requests = ticket.counts, prefill = ticket.prefill, decode = ticket.expected}
end

-- How long until it may come again; 0 when it may now.
local function must_wait(ticket)
  local levels, longest = levels_of(ticket), 0
  for kind, amount in pairs(price(ticket)) do
    if levels[kind] then
      local limit = ticket.limits[kind]
      local missing = math.min(amount, limit) - levels[kind]
      if missing > EPSILON then
        longest = math.max(longest, math.ceil(missing * MINUTE / limit))
      end
    end
  end
  if ticket.concurrent > 0 and ticket.counts > 0
    and redis.call('SCARD', active_key(ticket.tenant)) >= ticket.concurrent then
    longest = math.max(longest, 1000)
  end
  return longest
end

-- Triples of limit, rest, and milliseconds until it is full again, in the order of KINDS.
local function allowance(ticket)
  if not ticket.limited then return {} end
  local levels, told = levels_of(ticket), {}
  for _, kind in ipairs(KINDS) do
    local limit, level = ticket.limits[kind], levels[kind] or 0
    told[#told + 1] = limit
    told[#told + 1] = math.floor(level + EPSILON)
    told[#told + 1] = limit > 0 and math.ceil((limit - level) * MINUTE / limit) or 0
  end
  return told
end

-- What was charged for and not used comes back; what was used beyond it is charged.
local function settle(ticket, generated)
  local unused = generated == 0 and ticket.prefill or 0
  charge(ticket, {prefill = -unused, decode = generated - ticket.expected})
end
