-- Settle jobs: each gets its one terminal outcome, whoever calls, however often.
-- KEYS[1] dead stream; then four a place, a place being a batch in a lane: jobs:RUN:LANE, batches:RUN:ID,
--   results:RUN:ID, runs:RUN
-- ARGV[1] worker; then ten a job: place (from 0), entry id, index, outcome, policy, samples, tokens, body of the group,
--   error for the dead (empty: the job is not a dead letter), and then the body of the job
-- Returns two values a job: 1 and the outcome recorded now, or 0 and the one recorded before ("gone": the batch is
-- unknown, committed long ago or lost by the server).
local ARGS = 10
-- Lua's unpack is bounded by its C stack; so many values are well inside it.
local AT_ONCE = 1000
local worker = ARGV[1]
local replies, counts, entries = {}, {}, {}

local function add(key, field, amount)
  counts[key] = counts[key] or {}
  counts[key][field] = (counts[key][field] or 0) + amount
end

local function bury(stream, id, index, dead, job)
  local entry = redis.call('XRANGE', stream, id, id)
  -- Another host may have it by now, under another entry.
  local fields = entry[1] and entry[1][2] or {'index', index, 'body', job}
  redis.call('XADD', KEYS[1], '*', 'error', dead, 'worker', worker, unpack(fields))
end

for at = 2, #ARGV, ARGS do
  local place, id, index, outcome, policy, samples, tokens, body, dead, job = unpack(ARGV, at, at + ARGS - 1)
  local stream, batch, results, run = unpack(KEYS, 2 + 4 * place, 5 + 4 * place)
  local before = redis.call('HGET', batch, index)
  if before == 'open' then
    redis.call('HSET', batch, index, outcome)
    redis.call('XADD', results, '*', 'job', string.match(batch, '([^:]*)$') .. '/' .. index, 'outcome', outcome,
      'policy', policy, 'samples', samples, 'tokens', tokens, 'worker', worker, 'body', body)
    for _, key in ipairs({batch, run}) do
      add(key, 'open', -1)
      add(key, outcome, 1)
    end
    add(run, 'samples', samples)
    add(run, 'tokens', tokens)
    replies[#replies + 1] = 1
    replies[#replies + 1] = outcome
  else
    replies[#replies + 1] = 0
    replies[#replies + 1] = before or 'gone'
  end
  -- A dead letter of an unknown batch is kept too: it is what somebody added by hand, or what the server lost.
  if dead ~= '' and (before == 'open' or not before) then bury(stream, id, index, dead, job) end
  if id ~= '' then
    entries[stream] = entries[stream] or {}
    table.insert(entries[stream], id)
  end
end

-- The counters move once a call, and the entries go together: a third of the cost of doing it job by job.
for key, fields in pairs(counts) do
  for field, amount in pairs(fields) do redis.call('HINCRBY', key, field, amount) end
end
for stream, ids in pairs(entries) do
  for first = 1, #ids, AT_ONCE do
    local last = math.min(first + AT_ONCE - 1, #ids)
    redis.call('XACK', stream, 'workers', unpack(ids, first, last))
    -- Deleted whoever held it: a settled job needs no entry.
    redis.call('XDEL', stream, unpack(ids, first, last))
  end
end
return replies
