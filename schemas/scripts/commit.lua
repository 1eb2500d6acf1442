-- Commit a batch: its results were consumed and may go.
-- KEYS[1] runs; ARGV: run, batch, retention in seconds, groups that the trainer was handed ('' for all that are ok).
-- The hash stays for the retention, so that a late host or a repeated enqueue still meets the recorded outcomes.
-- Returns the number of open jobs: only 0 commits. -1: the batch is unknown.
local run, batch = ARGV[1], ARGV[2]
local states, counters = key('batches', run, batch), key('runs', run)
local open, bytes, read, committed, ok =
  unpack(redis.call('HMGET', states, 'open', 'bytes', 'read', 'committed', 'ok'))
if not open then return -1 end
if tonumber(open) > 0 then return tonumber(open) end
redis.call('UNLINK', key('results', run, batch), key('parts', run, batch))
try('ZREM', key('open', run), batch)
try('ZREM', key('deadlines'), run .. ':' .. batch)
if not committed then
  write('HINCRBY', counters, 'unread', tonumber(read or 0) - tonumber(bytes or 0))
  write('HSET', counters, 'touched_ms', now_ms())
  -- What nobody trains on takes no room under the staleness rule (enqueue.lua).
  local surplus = tonumber(ok or 0) - tonumber(ARGV[4] ~= '' and ARGV[4] or ok or 0)
  if surplus > 0 and redis.call('HEXISTS', counters, 'rule_jobs') == 1 then
    redis.call('HINCRBY', counters, 'rule_jobs', surplus)
  end
end
redis.call('HSET', states, 'committed', 1)
redis.call('EXPIRE', states, ARGV[3])
return 0
