-- The part of Redis that our scripts use, in the Lua that runs them: calling it costs next to
-- nothing. Times are milliseconds. A store is
--
-- values   key -> {kind, size, items}; a hash also has its fields in `order`; a string is a text
-- expires  key -> time
-- changes  key -> a number that grows whenever what it holds changes

-- Python's: what is published goes there; and numbers that are no small integers.
local publish, pack_number, unpack_number = ...

local store, now_us, now -- the one that is worked on, and its time

-- ---- arguments

-- A number as Redis stores it.
local function text(value)
  if type(value) == 'string' then return value end
  if value == math.floor(value) and math.abs(value) < 1e17 then
    return string.format('%d', value)
  end
  return string.format('%.17g', value)
end

local function score(value)
  return tonumber(value) or (value == '+inf' and math.huge) or (value == '-inf' and -math.huge)
    or error('ERR min or max is not a float', 0)
end

-- A border of a range of scores, and whether it lies outside.
local function border(value)
  if type(value) == 'string' and value:sub(1, 1) == '(' then return score(value:sub(2)), true end
  return score(value), false
end

-- ---- keys

local count = 0

local function changed(key)
  count = count + 1
  store.changes[key] = count
end

local function drop(key)
  if store.values[key] ~= nil then changed(key) end
  store.values[key], store.expires[key] = nil, nil
end

local function alive(key)
  local at = store.expires[key]
  if at and at <= now then drop(key) end
  return store.values[key] ~= nil
end

local function find(key, kind)
  local value = alive(key) and store.values[key] or nil
  if value and (type(value) == 'string' and 'string' or value.kind) ~= kind then
    error('WRONGTYPE Operation against a key holding the wrong kind of value', 0)
  end
  return value
end

local function made(key, kind)
  local value = find(key, kind)
  if not value then
    value = {kind = kind, size = 0, items = {}, order = {}}
    store.values[key] = value
  end
  return value
end

-- Returns 1 when it is new.
local function put(value, name, item)
  local new = value.items[name] == nil
  value.items[name] = item
  if not new then return 0 end
  value.size = value.size + 1
  if value.kind == 'hash' then value.order[value.size] = name end
  return 1
end

-- Returns how many of them were there.
local function remove(key, kind, ...)
  local value, gone = find(key, kind), 0
  if not value then return 0 end
  for i = 1, select('#', ...) do
    local name = text((select(i, ...)))
    if value.items[name] ~= nil then
      value.items[name], gone = nil, gone + 1
      for at, known in ipairs(value.order) do
        if known == name then
          table.remove(value.order, at)
          break
        end
      end
    end
  end
  value.size = value.size - gone
  if gone > 0 then changed(key) end
  if value.size == 0 then drop(key) end
  return gone
end

local function size_of(key, kind)
  local value = find(key, kind)
  return value and value.size or 0
end

-- ---- sorted sets

local function sorted(key)
  local value, names = find(key, 'zset'), {}
  if not value then return names, {} end
  local scores = value.items
  for name in pairs(scores) do names[#names + 1] = name end
  table.sort(names, function(one, other)
    if scores[one] ~= scores[other] then return scores[one] < scores[other] end
    return one < other
  end)
  return names, scores
end

local function between(key, low, high)
  local least, above = border(low)
  local most, below = border(high)
  local names, scores = sorted(key)
  local found = {}
  for _, name in ipairs(names) do
    local at = scores[name]
    local high_enough = at > least or (at == least and not above)
    local low_enough = at < most or (at == most and not below)
    if high_enough and low_enough then found[#found + 1] = name end
  end
  return found, scores
end

-- Of the names from `first` to `last`, those of the options that follow.
local function shown(names, scores, first, last, ...)
  local with_scores, skip, most = false, 0, math.huge
  for i = 1, select('#', ...) do
    local word = select(i, ...)
    if word == 'WITHSCORES' then with_scores = true end
    if word == 'LIMIT' then
      local from, size = select(i + 1, ...)
      skip, most = tonumber(from), tonumber(size)
    end
  end
  local answer = {}
  for i = first + skip, math.min(last, first + skip + most - 1) do
    answer[#answer + 1] = names[i]
    if with_scores then answer[#answer + 1] = text(scores[names[i]]) end
  end
  return answer
end

-- ---- commands

local commands = {}

function commands.TIME()
  return {text(math.floor(now_us / 1000000)), text(now_us % 1000000)}
end

function commands.EXISTS(...)
  local found = 0
  for _, key in ipairs({...}) do found = found + (alive(key) and 1 or 0) end
  return found
end

function commands.DEL(...)
  local gone = 0
  for _, key in ipairs({...}) do
    if alive(key) then
      drop(key)
      gone = gone + 1
    end
  end
  return gone
end

function commands.PEXPIRE(key, ms)
  if not alive(key) then return 0 end
  store.expires[key] = now + tonumber(ms)
  alive(key)
  return 1
end

function commands.PTTL(key)
  if not alive(key) then return -2 end
  return store.expires[key] and store.expires[key] - now or -1
end

function commands.PUBLISH(channel, message)
  return publish(channel, text(message))
end

function commands.GET(key)
  return find(key, 'string')
end

function commands.SET(key, value, unit, ms)
  if unit and unit ~= 'PX' then error('ERR syntax error', 0) end
  store.values[key], store.expires[key] = text(value), unit and now + tonumber(ms)
  changed(key)
  return {ok = 'OK'}
end

function commands.HSET(key, ...)
  local hash, new = made(key, 'hash'), 0
  for i = 1, select('#', ...), 2 do
    local name, value = select(i, ...)
    new = new + put(hash, text(name), text(value))
  end
  changed(key)
  return new
end

function commands.HGET(key, name)
  local hash = find(key, 'hash')
  return hash and hash.items[text(name)]
end

function commands.HMGET(key, ...)
  local hash, answer = find(key, 'hash'), {}
  for i, name in ipairs({...}) do
    answer[i] = hash and hash.items[text(name)] or false
  end
  return answer
end

function commands.HGETALL(key)
  local hash, answer = find(key, 'hash'), {}
  for i, name in ipairs(hash and hash.order or {}) do
    answer[2 * i - 1], answer[2 * i] = name, hash.items[name]
  end
  return answer
end

function commands.HDEL(key, ...)
  return remove(key, 'hash', ...)
end

function commands.SADD(key, ...)
  local set, new = made(key, 'set'), 0
  for i = 1, select('#', ...) do new = new + put(set, text((select(i, ...))), true) end
  changed(key)
  return new
end

function commands.SREM(key, ...)
  return remove(key, 'set', ...)
end

function commands.SCARD(key)
  return size_of(key, 'set')
end

function commands.ZADD(key, ...)
  local zset, new = made(key, 'zset'), 0
  for i = 1, select('#', ...), 2 do
    local at, name = select(i, ...)
    new = new + put(zset, text(name), score(at))
  end
  changed(key)
  return new
end

function commands.ZREM(key, ...)
  return remove(key, 'zset', ...)
end

function commands.ZSCORE(key, name)
  local zset = find(key, 'zset')
  local at = zset and zset.items[text(name)]
  return at and text(at)
end

function commands.ZCARD(key)
  return size_of(key, 'zset')
end

function commands.ZCOUNT(key, low, high)
  return #between(key, low, high)
end

function commands.ZRANGE(key, start, stop, ...)
  local names, scores = sorted(key)
  local first, last = tonumber(start), tonumber(stop)
  first = math.max(0, first < 0 and first + #names or first)
  last = math.min(#names - 1, last < 0 and last + #names or last)
  return shown(names, scores, first + 1, last + 1, ...)
end

function commands.ZRANGEBYSCORE(key, low, high, ...)
  local names, scores = between(key, low, high)
  return shown(names, scores, 1, #names, ...)
end

function commands.ZREMRANGEBYSCORE(key, low, high)
  return remove(key, 'zset', unpack((between(key, low, high))))
end

local function call(name, ...)
  local command = commands[name] or error("ERR unknown command '" .. tostring(name) .. "'", 0)
  local answer = command(...)
  if answer == nil then return false end
  return answer
end

-- ---- MessagePack

-- The 2, 4 or 8 bytes of a whole number, the first one first.
local function bytes(value, size)
  local low = value % 65536
  if size == 2 then return string.char((low - low % 256) / 256, low % 256) end
  return bytes((value - low) / 65536, size - 2) .. bytes(low, 2)
end

local function head(size, short, long)
  if size < 16 then return string.char(short + size) end
  return string.char(long) .. bytes(size, 2)
end

local function pack(value)
  local kind = type(value)
  if kind == 'string' then
    if #value < 32 then return string.char(160 + #value) .. value end
    if #value < 256 then return string.char(217, #value) .. value end
    if #value < 65536 then return '\218' .. bytes(#value, 2) .. value end
    return '\219' .. bytes(#value, 4) .. value
  end
  if kind == 'number' then
    if value ~= math.floor(value) or value < 0 or value >= 2 ^ 53 then return pack_number(value) end
    if value < 128 then return string.char(value) end
    if value < 2 ^ 16 then return '\205' .. bytes(value, 2) end
    if value < 2 ^ 32 then return '\206' .. bytes(value, 4) end
    return '\207' .. bytes(value, 8)
  end
  if kind == 'boolean' then return value and '\195' or '\194' end
  if kind ~= 'table' then return '\192' end
  local parts, size = {''}, 0
  for _ in pairs(value) do size = size + 1 end
  if size == #value then
    parts[1] = head(size, 144, 220)
    for _, item in ipairs(value) do parts[#parts + 1] = pack(item) end
  else
    parts[1] = head(size, 128, 222)
    for name, item in pairs(value) do parts[#parts + 1] = pack(name) .. pack(item) end
  end
  return table.concat(parts)
end

local function whole(packed, at, size)
  local value = 0
  for i = at, at + size - 1 do value = value * 256 + packed:byte(i) end
  return value
end

local unpack_at

local function list_at(packed, at, size)
  local list = {}
  for i = 1, size do list[i], at = unpack_at(packed, at) end
  return list, at
end

local function map_at(packed, at, size)
  local map = {}
  for _ = 1, size do
    local name, item
    name, at = unpack_at(packed, at)
    item, at = unpack_at(packed, at)
    map[name] = item
  end
  return map, at
end

-- By their first byte: how many bytes say how long it is, or what it is.
local TEXTS = {[196] = 1, [197] = 2, [198] = 4, [217] = 1, [218] = 2, [219] = 4}
local WHOLES = {[204] = 1, [205] = 2, [206] = 4, [207] = 8}
local OTHERS = {[202] = 5, [203] = 9, [208] = 2, [209] = 3, [210] = 5, [211] = 9}

-- The value that begins there, and where the next one does.
function unpack_at(packed, at)
  local first = packed:byte(at)
  if first < 128 then return first, at + 1 end
  if first < 144 then return map_at(packed, at + 1, first - 128) end
  if first < 160 then return list_at(packed, at + 1, first - 144) end
  if first < 192 then return packed:sub(at + 1, at + first - 160), at + first - 159 end
  if first >= 224 then return first - 256, at + 1 end
  local size = TEXTS[first]
  if size then
    local from = at + 1 + size
    local to = from + whole(packed, at + 1, size)
    return packed:sub(from, to - 1), to
  end
  size = WHOLES[first]
  if size then return whole(packed, at + 1, size), at + 1 + size end
  size = OTHERS[first]
  if size then return unpack_number(packed:sub(at, at + size - 1)), at + size end
  if first == 220 then return list_at(packed, at + 3, whole(packed, at + 1, 2)) end
  if first == 222 then return map_at(packed, at + 3, whole(packed, at + 1, 2)) end
  if first == 192 then return nil, at + 1 end
  return first == 195, at + 1
end

-- ---- scripts

redis = {call = call}
cmsgpack = {pack = pack, unpack = function(packed) return (unpack_at(packed, 1)) end}
KEYS, ARGV = {}, {}
setmetatable(_G, {
  __newindex = function(_, name) error('Attempt to write a global variable: ' .. name) end,
  __index = function(_, name)
    error("Script attempted to access nonexistent global variable '" .. tostring(name) .. "'")
  end,
})

-- ---- what Python calls

local function work_on(one, time_us)
  store, now_us, now = one, time_us, math.floor(time_us / 1000)
end

local out = {}

function out.new()
  return {values = {}, expires = {}, changes = {}}
end

function out.call(one, time_us, ...)
  work_on(one, time_us)
  return pcall(call, ...)
end

-- Run a script with so many keys, and what else there is.
function out.run(one, time_us, script, keys, ...)
  work_on(one, time_us)
  local arguments = {...}
  local names = {}
  for i = 1, keys do names[i] = table.remove(arguments, 1) end
  KEYS, ARGV = names, arguments
  return script()
end

function out.names(one, time_us)
  work_on(one, time_us)
  local found = {}
  for key in pairs(store.values) do found[#found + 1] = key end
  table.sort(found)
  local there = {}
  for _, key in ipairs(found) do
    if alive(key) then there[#there + 1] = key end
  end
  return unpack(there)
end

-- When it changed last.
function out.change(one, time_us, key)
  work_on(one, time_us)
  alive(key)
  return store.changes[key] or 0
end

-- Its kind, and what it holds: a text, or names and values in turn.
function out.read(one, key)
  local value = one.values[key]
  if type(value) ~= 'table' then return value and 'string', value end
  local found = {}
  for name, item in pairs(value.items) do
    found[#found + 1] = name
    found[#found + 1] = item
  end
  return value.kind, unpack(found)
end

function out.lasts(one, key)
  return one.expires[key] ~= nil
end

local function copied(value)
  if type(value) ~= 'table' then return value end
  local copy = {}
  for name, item in pairs(value) do copy[name] = copied(item) end
  return copy
end

function out.copy(one)
  return {values = copied(one.values), expires = copied(one.expires), changes = {}}
end

return out
