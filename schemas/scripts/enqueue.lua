-- Enqueue a batch, whole or not at all.
-- KEYS[1] batches:RUN:ID  hash: index -> state, and size, open, content, policy, created_ms
-- KEYS[2] open:RUN        sorted set of the run's uncommitted batches
-- KEYS[3] runs            set of run names
-- KEYS[4] runs:RUN        hash of counters
-- KEYS[5] jobs:RUN:LANE   stream
-- ARGV: run, batch, content hash, backlog limit (0: none), policy, n, then preview and body of each job.
-- Returns {"new" | "same", size}, or {"other", 0}, or {"full", open jobs of the run}.
local run, batch, content, limit, policy, n = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5], ARGV[6]
local FIRST = 7
local size = (#ARGV - FIRST + 1) / 2
local before = redis.call('HMGET', KEYS[1], 'content', 'size')
if before[1] then
  if before[1] == content then return {'same', tonumber(before[2])} end
  return {'other', 0}
end
local open = tonumber(redis.call('HGET', KEYS[4], 'open') or 0)
if limit > 0 and open > 0 and open + size > limit then return {'full', open} end

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('SADD', KEYS[3], run)
if redis.call('EXISTS', KEYS[5]) == 0 then
  redis.call('XGROUP', 'CREATE', KEYS[5], 'workers', '0', 'MKSTREAM')
end
redis.call('HSET', KEYS[1], 'content', content, 'size', size, 'open', size, 'policy', policy, 'created_ms', now)
redis.call('ZADD', KEYS[2], now, batch)
redis.call('HINCRBY', KEYS[4], 'enqueued', size)
redis.call('HINCRBY', KEYS[4], 'open', size)
-- Lua's unpack is bounded by its C stack; 1,000 pairs are well inside it.
local states = {}
for index = 0, size - 1 do
  local at = FIRST + 2 * index
  redis.call('XADD', KEYS[5], '*', 'job', batch .. '/' .. index, 'policy', policy, 'n', n, 'run', run,
    'preview', ARGV[at], 'body', ARGV[at + 1])
  states[#states + 1] = index
  states[#states + 1] = 'open'
  if #states == 2000 or index == size - 1 then
    redis.call('HSET', KEYS[1], unpack(states))
    states = {}
  end
end
return {'new', size}
