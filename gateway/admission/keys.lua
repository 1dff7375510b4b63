-- All API keys and tenants, unless the caller knows this version of them already.
-- Returns {version, keys, tenants}, or {version} when there is nothing new.

local version = redis.call('GET', KEYS[1]) or ''
if version == ARGV[1] then return {version} end
return {version, redis.call('HGETALL', KEYS[2]), redis.call('HGETALL', KEYS[3])}
