-- Publish a policy: record it, make it current, and tell the hosts, in one step.
-- KEYS[1] runs; ARGV: version, record as JSON, body of the command, checkpoint
-- Returns {"new" | "same", 0}; {"other", 0}: the version names another source; {"old", current version};
--   {"taken", version}: another version names this source, so nobody could tell which of them made a token.
local version = tonumber(ARGV[1])
local before = redis.call('HGET', key('policies'), ARGV[1])
if before then
  if cjson.decode(before).checkpoint == ARGV[4] then return {'same', 0} end
  return {'other', 0}
end
local current = tonumber(redis.call('GET', key('policy')) or -1)
if version <= current then return {'old', current} end
for _, record in ipairs(redis.call('HVALS', key('policies'))) do
  local policy = cjson.decode(record)
  if policy.checkpoint == ARGV[4] then return {'taken', policy.version} end
end
redis.call('HSET', key('policies'), ARGV[1], ARGV[2])
redis.call('SET', key('policy'), ARGV[1])
redis.call('XADD', key('control'), '*', 'kind', 'policy', 'policy', ARGV[1], 'checkpoint', ARGV[4], 'body', ARGV[3])
return {'new', 0}
