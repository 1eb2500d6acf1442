-- Put before every script below. Where a job can be, and how it gets from one place to another.
--
-- KEYS[1] is always runs, the set of run names: it routes the call in a cluster, and all other keys, which share its
-- hash tag, are built from it here. A job is in one place at a time:
--   jobs:RUN:LANE   stream, group workers: not given to a host yet (the backlog), or in a host's hands (pending)
--   retries         stream, group workers: in a host's hands, after it had waited in one of these:
--   ready:RUN:LANE  list of names: taken before the backlog of its lane
--   delayed         sorted set of names by server time in ms
--   parked:RUN      sorted set of names by the oldest policy version that may run it
--   exact:RUN       sorted set of names by the one policy version that may run it
-- The sorted set passed:WORKER is no place: it names jobs in `delayed` that this worker may take before their time, scored
-- by that time, and vanishes soon after it. A job with another time, or none, is not meant any more.
-- The state of a job is a field of batches:RUN:ID, INDEX -> 'open' or its outcome. A name is RUN:LANE:JOB, a job is
-- BATCH/INDEX, with #PART where its group is split; the fields of a waiting job are in the hash `waiting`, by its name. A name without
-- fields there is a tombstone, discarded by whoever meets it.
--
-- A key that holds another type than it should was made by hand. It is read as empty, so that it keeps nobody else
-- waiting; where something of ours has to be written to it, it gives way.
local PREFIX = string.sub(KEYS[1], 1, -5)
local GROUP = 'workers'
-- Lua's unpack is bounded by its C stack; so many values are well inside it.
local AT_ONCE = 1000
local LANES = {'high', 'default', 'low'}
local IS_LANE = {high = true, default = true, low = true}
-- Sorted sets of each run; `delayed` is one for all.
local SORTED = {'parked', 'exact'}
-- Ms that passed:WORKER outlasts the time of its last job.
local PASSED_GRACE_MS = 1000

local function key(kind, run, more)
  if more then return PREFIX .. kind .. ':' .. run .. ':' .. more end
  if run then return PREFIX .. kind .. ':' .. run end
  return PREFIX .. kind
end

-- Read; nothing (nil) where the key holds another type.
local function try(...)
  local reply = redis.pcall(...)
  if type(reply) ~= 'table' or not reply.err then return reply end
  if not string.find(reply.err, 'WRONGTYPE', 1, true) then error(reply) end
  return nil
end

-- Write to a key, whatever it holds.
local function write(command, name, ...)
  local reply = try(command, name, ...)
  if reply ~= nil then return reply end
  redis.call('UNLINK', name)
  return redis.call(command, name, ...)
end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function field(fields, name)
  for at = 1, #fields, 2 do
    if fields[at] == name then return fields[at + 1] end
  end
end

-- A number from least to most; `other` where it is none, as one that somebody made up.
local function number(text, least, most, other)
  local value = tonumber(text)
  if value and value >= least and value <= most then return value end
  return other
end

-- As Python reads a count (entries.py).
local function count_of(fields, name) return math.floor(number(field(fields, name), 0, 999999999, 0)) end

-- BATCH/INDEX or BATCH/INDEX#PART; nothing where it is neither.
local function parse(job)
  local batch, index, part = string.match(job or '', '^([^/:#]+)/(%d+)#?(%d*)$')
  return batch, index, part
end

-- Values of many fields; a group says of which key those from `first` on are, up to the next group's.
local function values_of(groups, fields)
  local values = {}
  for number_of_group, group in ipairs(groups) do
    local following = groups[number_of_group + 1]
    local last = following and following.first - 1 or #fields
    for from = group.first, last, AT_ONCE do
      local upto = math.min(from + AT_ONCE - 1, last)
      local found = try('HMGET', group.key, unpack(fields, from, upto)) or {}
      for at = from, upto do values[at] = found[at - from + 1] end
    end
  end
  return values
end

-- Of each job: true; false where it has an outcome or that part of it is finished; nil where no job of ours is named.
-- One command for jobs of a batch that follow each other.
local function are_open(runs, jobs, count)
  local groups, indexes, places, parts = {}, {}, {}, {}
  local last_run, last_batch
  for at = 1, count do
    local run, batch, index, part = runs[at], parse(jobs[at])
    if batch and run then
      local asked = #places + 1
      if batch ~= last_batch or run ~= last_run then
        groups[#groups + 1] = {key = key('batches', run, batch), first = asked}
        last_run, last_batch = run, batch
      end
      indexes[asked], places[asked] = index, at
      if part ~= '' then parts[#parts + 1] = {at = at, key = key('parts', run, batch), name = index .. '#' .. part} end
    end
  end
  local open = {}
  for asked, state in pairs(values_of(groups, indexes)) do open[places[asked]] = state == 'open' end
  -- Those of wrong keys have no value: they are as good as unknown.
  for _, at in ipairs(places) do open[at] = open[at] or false end
  for _, part in ipairs(parts) do
    if open[part.at] then open[part.at] = try('HEXISTS', part.key, part.name) ~= 1 end
  end
  return open
end

local function is_open(run, job) return are_open({run}, {job}, 1)[1] end

-- Take jobs out of whatever places they wait in.
local function forget(names)
  for from = 1, #names, AT_ONCE do
    local some, by_run = {unpack(names, from, math.min(from + AT_ONCE - 1, #names))}, {}
    if (try('HDEL', key('waiting'), unpack(some)) or 0) > 0 then
      try('ZREM', key('delayed'), unpack(some))
      for _, name in ipairs(some) do
        local run = string.match(name, '^([^:]*):')
        by_run[run] = by_run[run] or {}
        table.insert(by_run[run], name)
      end
      for run, theirs in pairs(by_run) do
        for _, place in ipairs(SORTED) do try('ZREM', key(place, run), unpack(theirs)) end
      end
    end
  end
end

-- Let a job wait that comes from a stream: at the front of its lane, or in a sorted set. From now on it carries its lane.
local function wait(fields, stream, place, score)
  local run, lane, job = field(fields, 'run'), field(fields, 'lane'), field(fields, 'job')
  if not lane then
    lane = string.match(stream, '([^:]*)$')
    fields[#fields + 1], fields[#fields + 2] = 'lane', lane
  end
  if not IS_LANE[lane] then lane = 'default' end
  local name = run .. ':' .. lane .. ':' .. job
  forget({name})
  write('HSET', key('waiting'), name, cmsgpack.pack(fields))
  if place == 'ready' then
    write('RPUSH', key('ready', run, lane), name)
  elseif place == 'parked' or place == 'exact' then
    write('ZADD', key(place, run), score, name)
  else
    write('ZADD', key('delayed'), score, name)
    if place == 'passed' then
      local passed = key('passed', field(fields, 'passed') or '')
      write('ZADD', passed, score, name)
      redis.call('PEXPIREAT', passed, score + PASSED_GRACE_MS)
    end
  end
end

-- A name that left its sorted set goes to the front of its lane.
local function to_ready(name)
  local run, lane = string.match(name, '^([^:]+):([^:]+):')
  if IS_LANE[lane] and try('HEXISTS', key('waiting'), name) == 1 then write('RPUSH', key('ready', run, lane), name) end
end

-- Move names from a sorted set to the front of their lanes. Returns how many left the set.
local function release(place, from, upto, most)
  local names = try('ZRANGEBYSCORE', place, from, upto, 'LIMIT', 0, most) or {}
  for _, name in ipairs(names) do
    redis.call('ZREM', place, name)
    to_ready(name)
  end
  return #names
end

-- What delivery has cost a job so far is carried in fields of its entry; a move replaces them.
local CARRIED = {attempts = true, faults = true, losses = true, company = true, avoid = true, history = true, passed = true,
  done = true}

local function without_carried(fields)
  local kept = {}
  -- No entry of ours has so many fields; unpack would fail on one that somebody added by hand.
  for at = 1, math.min(#fields, AT_ONCE - 20), 2 do
    if not CARRIED[fields[at]] then
      kept[#kept + 1] = fields[at]
      kept[#kept + 1] = fields[at + 1]
    end
  end
  return kept
end

-- Give an outcome to the open jobs of a batch with an index from `first` to `last`, wherever they are; the results have
-- no body, since no host made one. Returns how many.
local function finish(run, batch, first, last, outcome, error_text)
  local states, counters, results = key('batches', run, batch), key('runs', run), key('results', run, batch)
  local size, policy, lane, parts = unpack(try('HMGET', states, 'size', 'policy', 'lane', 'parts') or {})
  first, last = math.max(first, 0), math.min(last, (tonumber(size) or 0) - 1)
  local ended, names, finished = {}, {}, {}
  for from = first, last, AT_ONCE do
    local indexes = {}
    for index = from, math.min(from + AT_ONCE - 1, last) do indexes[#indexes + 1] = index end
    for at, state in ipairs(redis.call('HMGET', states, unpack(indexes))) do
      if state == 'open' then ended[#ended + 1] = indexes[at] end
    end
  end
  if #ended == 0 then return 0 end
  parts = number(parts, 1, AT_ONCE, 1)
  for _, index in ipairs(ended) do
    local job = batch .. '/' .. index
    write('XADD', results, '*', 'job', job, 'outcome', outcome, 'policy', policy or 0, 'samples', 0, 'tokens', 0,
      'worker', '', 'error', error_text)
    redis.call('HSET', states, index, outcome)
    local name = run .. ':' .. (lane or 'default') .. ':' .. job
    if parts == 1 then names[#names + 1] = name end
    for part = 0, parts > 1 and parts - 1 or -1 do
      names[#names + 1] = name .. '#' .. part
      finished[#finished + 1] = index .. '#' .. part
    end
  end
  for _, name in ipairs({states, counters}) do
    write('HINCRBY', name, 'open', -#ended)
    write('HINCRBY', name, outcome, #ended)
  end
  forget(names)
  for from = 1, #finished, AT_ONCE do
    try('HDEL', key('parts', run, batch), unpack(finished, from, math.min(from + AT_ONCE - 1, #finished)))
  end
  return #ended
end

-- Hosts listen: they look again at what they have of this batch.
local function tell_ended(run, batch) redis.call('PUBLISH', key('ended'), run .. ':' .. batch) end
