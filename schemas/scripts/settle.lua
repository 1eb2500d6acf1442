-- Settle jobs: each gets its one terminal outcome, whoever calls, however often.
-- KEYS[1] runs; ARGV[1] worker, ARGV[2] places; then three a place, a place being a batch in a stream: stream, run, batch;
--   then eleven a job: place (from 0), entry id, index, part, outcome, policy, samples, tokens, body of the group, error for
--   the dead (empty: the job is not a dead letter), and then the body of the job.
-- A part of a split group that ends `ok` waits in parts:RUN:ID; the last one puts the group together, as the fields body,
-- body:1, body:2 and so on of one result. A part that ends otherwise ends the whole group.
-- Returns two values a job: 1 and the outcome recorded now ("part": the others are still to come), or 0 and the one
-- recorded before ("gone": the batch is unknown, committed long ago or lost by the server).
local ARGS, PLACE = 11, 3
local worker, count_of_places = ARGV[1], tonumber(ARGV[2])
local FIRST = 3 + PLACE * count_of_places
local places, replies, counts, entries = {}, {}, {}, {}
-- Names of jobs that are settled now: no other copy may wait anywhere, and this host may be one that was given up for lost.
local names = {}
local anyone_waits = redis.call('EXISTS', key('waiting')) == 1

local function add(name, what, amount)
  counts[name] = counts[name] or {}
  counts[name][what] = (counts[name][what] or 0) + amount
end

-- Each place with what its batch says of the jobs of this call: one command a batch.
local function look_up()
  for at = 1, count_of_places do
    local stream, run, batch = unpack(ARGV, PLACE * at, PLACE * at + PLACE - 1)
    places[at] = {
      stream = stream, run = run, batch = batch, indexes = {'lane', 'parts'}, outcomes = {},
      states = key('batches', run, batch), counters = key('runs', run), results = key('results', run, batch),
    }
  end
  for at = FIRST, #ARGV, ARGS do
    local indexes = places[ARGV[at] + 1].indexes
    indexes[#indexes + 1] = ARGV[at + 2]
  end
  for _, place in ipairs(places) do
    for from = 1, #place.indexes, AT_ONCE do
      local upto = math.min(from + AT_ONCE - 1, #place.indexes)
      local states = try('HMGET', place.states, unpack(place.indexes, from, upto)) or {}
      for index = from, upto do place.outcomes[place.indexes[index]] = states[index - from + 1] end
    end
    place.parts = number(place.outcomes.parts, 1, AT_ONCE, 1)
  end
end

-- An open job is kept even where its entry is gone: another host has it by now, under another entry. One of an unknown
-- batch (added by hand, or lost by the server) is kept while its entry is there: a repeated call would keep it twice.
local function bury(place, id, index, known, dead, body)
  local entry = id ~= '' and (try('XRANGE', place.stream, id, id) or {})[1]
  if not entry and not known then return end
  local fields = entry and entry[2] or {'job', place.batch .. '/' .. index, 'run', place.run, 'body', body}
  write('XADD', key('dead'), '*', 'error', dead, 'worker', worker, unpack(fields, 1, math.min(#fields, AT_ONCE)))
end

-- Record the outcome of a job; `result` ends the fields of its result, of which `bytes` are bodies.
local function record(place, index, outcome, policy, samples, tokens, result, bytes)
  write('XADD', place.results, '*', 'job', place.batch .. '/' .. index, 'outcome', outcome, 'policy', policy,
    'samples', samples, 'tokens', tokens, 'worker', worker, unpack(result))
  redis.call('HSET', place.states, index, outcome)
  place.outcomes[index] = outcome
  for _, name in ipairs({place.states, place.counters}) do
    add(name, 'open', -1)
    add(name, outcome, 1)
  end
  add(place.counters, 'samples', samples)
  add(place.counters, 'tokens', tokens)
  add(place.counters, 'unread', bytes)
  add(place.states, 'bytes', bytes)
  return 1, outcome
end

local function forget_later(place, index, first, last)
  if not anyone_waits then return end
  local name = place.run .. ':' .. (place.outcomes.lane or 'default') .. ':' .. place.batch .. '/' .. index
  if place.parts == 1 then names[#names + 1] = name return end
  for part = first, last do names[#names + 1] = name .. '#' .. part end
end

-- Fields of a split group in parts:RUN:ID, one a part.
local function part_names(place, index)
  local all = {}
  for part = 0, place.parts - 1 do all[#all + 1] = index .. '#' .. part end
  return all
end

-- True when no part is missing; asked from the next one on, since hosts take them in order and mostly end them so.
local function is_last(place, finished, index, part)
  for ahead = 1, place.parts - 1 do
    if redis.call('HEXISTS', finished, index .. '#' .. (part + ahead) % place.parts) == 0 then return false end
  end
  return true
end

-- All parts are there: one result of them, in order.
local function put_together(place, finished, index)
  local all, versions, seen, result, samples, tokens, bytes = part_names(place, index), {}, {}, {}, 0, 0, 0
  for at, packed in ipairs(redis.call('HMGET', finished, unpack(all))) do
    local whole, part = pcall(cmsgpack.unpack, packed)
    if not whole or type(part) ~= 'table' or #part ~= 4 then
      redis.call('HDEL', finished, unpack(all))
      local damaged = {'error', 'its finished part ' .. (at - 1) .. ' was overwritten on the server'}
      return record(place, index, 'failed', 0, 0, 0, damaged, 0)
    end
    for version in string.gmatch(part[1], '[^,]+') do
      if not seen[version] then versions[#versions + 1] = version end
      seen[version] = true
    end
    samples, tokens, bytes = samples + part[2], tokens + part[3], bytes + #part[4]
    result[#result + 1] = at == 1 and 'body' or 'body:' .. (at - 1)
    result[#result + 1] = part[4]
  end
  redis.call('HDEL', finished, unpack(all))
  table.sort(versions, function(one, other) return (tonumber(one) or 0) < (tonumber(other) or 0) end)
  return record(place, index, 'ok', table.concat(versions, ','), samples, tokens, result, bytes)
end

-- A part that ended `ok`: keep it, and record the group when it is the last.
local function settle_part(place, index, part, policy, samples, tokens, body)
  local finished = key('parts', place.run, place.batch)
  local new = write('HSETNX', finished, index .. '#' .. part, cmsgpack.pack({policy, samples, tokens, body}))
  forget_later(place, index, part, part)
  if new == 0 or not is_last(place, finished, index, part) then return new, 'part' end
  return put_together(place, finished, index)
end

local function settle(place, index, part, outcome, policy, samples, tokens, body)
  local before = place.outcomes[index]
  if before ~= 'open' then return 0, before or 'gone' end
  if place.parts == 1 then
    forget_later(place, index)
    return record(place, index, outcome, policy, samples, tokens, {'body', body}, #body)
  end
  if part >= place.parts then return 0, 'gone' end  -- somebody's own: no such part was enqueued
  if outcome == 'ok' then return settle_part(place, index, part, policy, samples, tokens, body) end
  forget_later(place, index, 0, place.parts - 1)
  record(place, index, outcome, policy, samples, tokens, {'body', body}, #body)
  try('HDEL', key('parts', place.run, place.batch), unpack(part_names(place, index)))
  tell_ended(place.run, place.batch)  -- whoever runs another part of it may stop
  return 1, outcome
end

look_up()
for at = FIRST, #ARGV, ARGS do
  local number_of_place, id, index, part, outcome, policy, samples, tokens, body, dead, job = unpack(ARGV, at, at + ARGS - 1)
  local place = places[number_of_place + 1]
  local now, recorded = settle(place, index, tonumber(part), outcome, policy, samples, tokens, body)
  if dead ~= '' and (now == 1 or recorded == 'gone') then bury(place, id, index, recorded ~= 'gone', dead, job) end
  replies[#replies + 1] = now
  replies[#replies + 1] = recorded
  if id ~= '' then
    entries[place.stream] = entries[place.stream] or {}
    table.insert(entries[place.stream], id)
  end
end

-- The counters move once a call, and the entries go together: fewer commands than job by job.
for name, fields in pairs(counts) do
  for what, amount in pairs(fields) do write('HINCRBY', name, what, amount) end
end
forget(names)
for stream, ids in pairs(entries) do
  for first = 1, #ids, AT_ONCE do
    local last = math.min(first + AT_ONCE - 1, #ids)
    -- pcall: somebody else's key may stand there by now. Deleted whoever held it: a settled job needs no entry.
    redis.pcall('XACK', stream, GROUP, unpack(ids, first, last))
    redis.pcall('XDEL', stream, unpack(ids, first, last))
  end
end
return replies
