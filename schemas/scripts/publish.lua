-- Publish a policy: record it, make it current, and tell the hosts, in one step.
-- KEYS[1] policies hash, KEYS[2] policy string, KEYS[3] control stream
-- ARGV: version, record as JSON, body of the command, checkpoint
-- Returns {"new" | "same", 0}; {"other", 0}: the version names another source; {"old", current version};
--   {"taken", version}: another version names this source, so nobody could tell which of them made a token.
local version = tonumber(ARGV[1])
local before = redis.call('HGET', KEYS[1], ARGV[1])
if before then
  if cjson.decode(before).checkpoint == ARGV[4] then return {'same', 0} end
  return {'other', 0}
end
local current = tonumber(redis.call('GET', KEYS[2]) or -1)
if version <= current then return {'old', current} end
for _, record in ipairs(redis.call('HVALS', KEYS[1])) do
  local policy = cjson.decode(record)
  if policy.checkpoint == ARGV[4] then return {'taken', policy.version} end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('SET', KEYS[2], ARGV[1])
redis.call('XADD', KEYS[3], '*', 'kind', 'policy', 'policy', ARGV[1], 'checkpoint', ARGV[4], 'body', ARGV[3])
return {'new', 0}
