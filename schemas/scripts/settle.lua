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

-- An open job is kept even where its entry is gone: another host has it by now, under another entry. One of an unknown
-- batch (added by hand, or lost by the server) is kept while its entry is there: a repeated call would keep it twice.
local function bury(stream, id, name, before, dead, job)
  local entry = id ~= '' and redis.call('XRANGE', stream, id, id)[1]
  if not entry and not before then return end
  local fields = entry and entry[2] or {'job', name, 'body', job}
  -- No entry of ours has so many fields; unpack, and with it the whole call, would fail on one added by hand.
  redis.call('XADD', KEYS[1], '*', 'error', dead, 'worker', worker, unpack(fields, 1, math.min(#fields, AT_ONCE)))
end

for at = 2, #ARGV, ARGS do
  local place, id, index, outcome, policy, samples, tokens, body, dead, job = unpack(ARGV, at, at + ARGS - 1)
  local stream, batch, results, run = unpack(KEYS, 2 + 4 * place, 5 + 4 * place)
  local name = string.match(batch, '([^:]*)$') .. '/' .. index
  local before = redis.call('HGET', batch, index)
  if before == 'open' then
    redis.call('HSET', batch, index, outcome)
    redis.call('XADD', results, '*', 'job', name, 'outcome', outcome, 'policy', policy, 'samples', samples,
      'tokens', tokens, 'worker', worker, 'body', body)
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
  if dead ~= '' and (before == 'open' or not before) then bury(stream, id, name, before, dead, job) end
  if id ~= '' then
    entries[stream] = entries[stream] or {}
    table.insert(entries[stream], id)
  end
end

-- The counters move once a call, and the entries go together: fewer commands than job by job.
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
