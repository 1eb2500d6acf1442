-- Settle jobs: each gets its one terminal outcome, whoever calls, however often.
-- KEYS[1] dead stream; then four a job: jobs:RUN:LANE, batches:RUN:ID, results:RUN:ID, runs:RUN
-- ARGV, nine a job: entry id, index, outcome, policy, samples, tokens, body of the group, worker, error for the dead
--   (empty: the job is not a dead letter)
-- Returns two values a job: 1 and the outcome recorded now, or 0 and the one recorded before ("gone": the batch is
-- unknown, committed long ago or lost by the server).
local ARGS = 9
local replies = {}
for job = 0, #ARGV / ARGS - 1 do
  local stream, batch, results, run = unpack(KEYS, 2 + 4 * job, 5 + 4 * job)
  local id, index, outcome, policy, samples, tokens, body, worker, dead = unpack(ARGV, 1 + ARGS * job, ARGS * (job + 1))
  local before = redis.call('HGET', batch, index)
  if before == 'open' then
    redis.call('HSET', batch, index, outcome)
    redis.call('HINCRBY', batch, 'open', -1)
    redis.call('HINCRBY', batch, outcome, 1)
    local name = string.match(batch, '([^:]*)$') .. '/' .. index
    redis.call('XADD', results, '*', 'job', name, 'outcome', outcome, 'policy', policy, 'samples', samples,
      'tokens', tokens, 'worker', worker, 'body', body)
    redis.call('HINCRBY', run, 'open', -1)
    redis.call('HINCRBY', run, outcome, 1)
    redis.call('HINCRBY', run, 'samples', samples)
    redis.call('HINCRBY', run, 'tokens', tokens)
    if dead ~= '' then
      local entry = redis.call('XRANGE', stream, id, id)
      local fields = entry[1] and entry[1][2] or {'job', name}
      redis.call('XADD', KEYS[1], '*', 'error', dead, 'worker', worker, unpack(fields))
    end
    replies[#replies + 1] = 1
    replies[#replies + 1] = outcome
  else
    replies[#replies + 1] = 0
    replies[#replies + 1] = before or 'gone'
  end
  if redis.call('XACK', stream, 'workers', id) == 1 then redis.call('XDEL', stream, id) end
end
return replies
