-- Settle jobs: each gets its one terminal outcome, whoever calls, however often.
-- KEYS[1] dead stream; then four a job: jobs:RUN:LANE, batches:RUN:ID, results:RUN:ID, runs:RUN
-- ARGV, ten a job: entry id (empty: settled without one, as a cancellation is), index, outcome, policy, samples,
--   tokens, body of the group, worker, error for the dead (empty: the job is not a dead letter), the dead job's body
-- Returns two values a job: 1 and the outcome recorded now, or 0 and the one recorded before ("gone": the batch is
-- unknown, committed long ago or lost by the server).
local ARGS = 10
local replies = {}

-- The entry is gone where the job was reclaimed meanwhile; a dead letter can be sent again all the same.
local function bury(stream, id, name, dead, worker, payload)
  local entry = id ~= '' and redis.call('XRANGE', stream, id, id)[1]
  local fields = entry and entry[2] or {'job', name, 'body', payload}
  -- No entry of ours has so many fields; unpack would fail on one that somebody added by hand.
  redis.call('XADD', KEYS[1], '*', 'error', dead, 'worker', worker, unpack(fields, 1, math.min(#fields, 1000)))
end

for job = 0, #ARGV / ARGS - 1 do
  local stream, batch, results, run = unpack(KEYS, 2 + 4 * job, 5 + 4 * job)
  local id, index, outcome, policy, samples, tokens, body, worker, dead, payload =
    unpack(ARGV, 1 + ARGS * job, ARGS * (job + 1))
  local name = string.match(batch, '([^:]*)$') .. '/' .. index
  local before = redis.call('HGET', batch, index)
  if before == 'open' then
    redis.call('HSET', batch, index, outcome)
    redis.call('HINCRBY', batch, 'open', -1)
    redis.call('HINCRBY', batch, outcome, 1)
    redis.call('XADD', results, '*', 'job', name, 'outcome', outcome, 'policy', policy, 'samples', samples,
      'tokens', tokens, 'worker', worker, 'body', body)
    redis.call('HINCRBY', run, 'open', -1)
    redis.call('HINCRBY', run, outcome, 1)
    redis.call('HINCRBY', run, 'samples', samples)
    redis.call('HINCRBY', run, 'tokens', tokens)
    replies[#replies + 1] = 1
    replies[#replies + 1] = outcome
  else
    replies[#replies + 1] = 0
    replies[#replies + 1] = before or 'gone'
  end
  local held = id ~= '' and redis.call('XACK', stream, 'workers', id) == 1
  -- A dead letter of an unknown batch is kept too: it is what somebody added by hand, or what the server lost. Only
  -- by the call that still held it: a repeated one would keep it twice.
  if dead ~= '' and (before == 'open' or held and not before) then bury(stream, id, name, dead, worker, payload) end
  if held then redis.call('XDEL', stream, id) end
end
return replies
