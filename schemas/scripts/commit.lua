-- Commit a batch: its results were consumed and may go.
-- KEYS[1] batches:RUN:ID, KEYS[2] results:RUN:ID, KEYS[3] open:RUN; ARGV: batch, retention in seconds.
-- The hash stays for the retention, so that a late host or a repeated enqueue still meets the recorded outcomes.
-- Returns the number of open jobs: only 0 commits. -1: the batch is unknown.
local open = redis.call('HGET', KEYS[1], 'open')
if not open then return -1 end
if tonumber(open) > 0 then return tonumber(open) end
redis.call('UNLINK', KEYS[2])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('HSET', KEYS[1], 'committed', 1)
redis.call('EXPIRE', KEYS[1], ARGV[2])
return 0
