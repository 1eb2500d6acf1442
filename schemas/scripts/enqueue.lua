-- Enqueue a batch, whole or not at all.
-- KEYS[1] runs; ARGV: run, batch, lane, content hash, backlog limit (0: none), policy, n, parts of each job, deadline in
--   server ms ('' for none), weight of the run ('' leaves it), staleness and training batch of the admission rule ('' for
--   no rule), then preview and body of each entry, a job's parts in order.
-- Returns {"new" | "same", size}, {"other", 0}, {"full", open jobs of the run}, or {"stale", jobs the rule has room for}.
local run, batch, lane, content, limit = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local policy, n, parts, deadline, weight = ARGV[6], ARGV[7], tonumber(ARGV[8]), ARGV[9], ARGV[10]
local staleness, training_batch = tonumber(ARGV[11]), tonumber(ARGV[12])
local FIRST = 13
local size = (#ARGV - FIRST + 1) / 2 / parts
local states, counters, stream = key('batches', run, batch), key('runs', run), key('jobs', run, lane)

-- All that can go wrong is looked at before anything is written.
if parts > AT_ONCE then return redis.error_reply('ERR a group of ' .. parts .. ' parts; at most ' .. AT_ONCE) end
if size ~= math.floor(size) then return redis.error_reply('ERR the last job has not all of its ' .. parts .. ' parts') end
local kind = redis.call('TYPE', stream).ok
if kind ~= 'stream' and kind ~= 'none' then
  return redis.error_reply('WRONGTYPE ' .. stream .. ' holds a ' .. kind .. ' and not a stream: delete it')
end
local before = redis.call('HMGET', states, 'content', 'size')
if before[1] then
  if before[1] == content then return {'same', tonumber(before[2])} end
  return {'other', 0}
end
local facts = redis.call('HMGET', counters, 'open', 'ok', 'pass', 'rule_version', 'rule_jobs')
local open, ok = tonumber(facts[1] or 0), tonumber(facts[2] or 0)
if limit > 0 and open > 0 and open + size > limit then return {'full', open} end
local rule = {}
if staleness then
  -- AReaL: (staleness + version + 1) * batch - (accepted + running), counted from when the run began to be held to it;
  -- until the first policy is published, no version has been trained.
  local version = tonumber(redis.call('GET', key('policy', run)) or redis.call('GET', key('policy')))
  local from_version, from_jobs = tonumber(facts[4]) or version, tonumber(facts[5]) or ok + open
  local trained = version and version - from_version or 0
  local room = (staleness + trained + 1) * training_batch - (ok + open - from_jobs)
  if size > room then return {'stale', math.max(0, room)} end
  rule = {'rule_jobs', from_jobs, from_version and 'rule_version', from_version}
end

local now = now_ms()
redis.call('SADD', KEYS[1], run)
redis.call('PERSIST', counters)
if kind == 'none' then redis.call('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM') end
redis.call('HSET', states, 'content', content, 'size', size, 'open', size, 'policy', policy, 'lane', lane, 'parts', parts,
  'created_ms', now)
write('ZADD', key('open', run), now, batch)
if deadline ~= '' then write('ZADD', key('deadlines'), deadline, run .. ':' .. batch) end
if open == 0 then
  -- A run that was idle has saved nothing up: it joins at the pool's virtual time.
  redis.call('HSET', counters, 'pass', math.max(tonumber(facts[3]) or 0, tonumber(try('GET', key('fair'))) or 0))
end
if weight ~= '' then redis.call('HSET', counters, 'weight', weight) end
redis.call('HSET', counters, 'touched_ms', now, unpack(rule))
redis.call('HINCRBY', counters, 'enqueued', size)
redis.call('HINCRBY', counters, 'open', size)

local call, prefix = redis.call, batch .. '/'
for entry = 0, size * parts - 1 do
  local at = FIRST + 2 * entry
  local name = parts == 1 and entry or math.floor(entry / parts) .. '#' .. entry % parts
  call('XADD', stream, '*', 'job', prefix .. name, 'policy', policy, 'n', n, 'run', run, 'preview', ARGV[at],
    'body', ARGV[at + 1])
end
local marks = {}
for index = 0, size - 1 do
  marks[#marks + 1] = index
  marks[#marks + 1] = 'open'
  if #marks >= AT_ONCE or index == size - 1 then
    redis.call('HSET', states, unpack(marks))
    marks = {}
  end
end
return {'new', size}
