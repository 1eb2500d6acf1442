-- Pull jobs for one host: lane by lane, in a lane run by run as their weights say, and of each run first what waited.
-- KEYS[1] runs; ARGV: consumer, jobs wanted, bytes of unread results over which a run gets no more made (0: no bound), a
--   worker whose jobs are left to others, those that it lost more than once ('': none are left); then two a run: its name, and what this host serves to it, as NEWEST:VERSION,VERSION. Jobs that were parked for a version up
--   to the newest come back to their lanes, and exact ones of each of these versions.
-- Within a lane the run with the least virtual time goes first (start-time fair queuing); n samples of a run move its time
-- on by n / weight. Entries whose job is settled already are discarded here.
-- Returns a list of {stream, entry id, {field, value, ...}}; the names of the runs that are over that bound; and 1 when it
-- stopped for having discarded so much.
local consumer, wanted, bound, leave = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
-- Entries of settled jobs that one call clears away, about: some 30 ms where it reads them one by one. A batch that was
-- cancelled may have far more.
local MOST_DISCARDED = 4000
-- Names that one call moves back to their lanes because a policy came, about, of all runs together. Those that go first
-- in their lane are first here too, so that in time each gets its turn.
local MOST_RELEASED = 4000
local retries, waiting = key('retries'), key('waiting')
local found, full, discarded, released = {}, {}, 0, 0
-- Ids of what was moved to `retries`, which this host holds once they are claimed.
local moved = {}

-- A job that waited, as the fields of its entry; nothing for a tombstone, and for what somebody else put there.
local function fields_of(name)
  local packed = try('HGET', waiting, name)
  if not packed then return end
  redis.call('HDEL', waiting, name)
  local whole, fields = pcall(cmsgpack.unpack, packed)
  if not whole or type(fields) ~= 'table' or #fields % 2 == 1 or #fields > AT_ONCE then return end
  for _, value in ipairs(fields) do
    if type(value) ~= 'string' then return end
  end
  if is_open(field(fields, 'run'), field(fields, 'job')) then return fields end
end

-- Text -> number, of the few there are.
local numbers = {}

local function samples_of(fields)
  local n = field(fields, 'n') or ''
  numbers[n] = numbers[n] or number(n, 1, 1e9, 1)
  return numbers[n]
end

local function is_left(fields)
  return leave ~= '' and field(fields, 'avoid') == leave and count_of(fields, 'losses') > 1
end

-- Take names from the list of one lane, to `retries`. Returns jobs and samples.
local function take_waiting(run, lane, count)
  local list, kept, samples, left = key('ready', run, lane), 0, 0, {}
  while kept < count and discarded < MOST_DISCARDED do
    local name = try('LPOP', list)
    if not name then break end
    local fields = fields_of(name)
    if fields and is_left(fields) then
      left[#left + 1] = name
      redis.call('HSET', waiting, name, cmsgpack.pack(fields))
    elseif fields then
      local id = write('XADD', retries, '*', unpack(fields))
      moved[#moved + 1] = id
      found[#found + 1] = {retries, id, fields}
      kept, samples = kept + 1, samples + samples_of(fields)
    else
      discarded = discarded + 1
    end
  end
  -- In their order, before all others.
  for at = #left, 1, -1 do redis.call('LPUSH', list, left[at]) end
  return kept, samples
end

-- What was added to `retries` is this host's; by itself, and not by reading on, which would meet what others put there.
local function claim_moved()
  for from = 1, #moved, AT_ONCE do
    local ids = {unpack(moved, from, math.min(from + AT_ONCE - 1, #moved))}
    local claim = {'XCLAIM', retries, GROUP, consumer, 0, unpack(ids)}
    for _, word in ipairs({'FORCE', 'JUSTID', 'LASTID', ids[#ids]}) do claim[#claim + 1] = word end
    local reply = redis.pcall(unpack(claim))
    if reply.err then  -- the first entry of all, or somebody destroyed the group
      redis.call('XGROUP', 'CREATE', retries, GROUP, '0')
      redis.call(unpack(claim))
    end
  end
end

local function read(stream, count)
  local reply = redis.pcall('XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', count, 'STREAMS', stream, '>')
  if reply and reply.err then
    if not string.find(reply.err, 'NOGROUP') then error(reply) end
    -- Somebody destroyed the group, or made the stream without one: begin at its first entry.
    redis.call('XGROUP', 'CREATE', stream, GROUP, '0')
    return read(stream, count)
  end
  return reply and reply[1][2] or {}
end

-- Keep what is still open, and what is not ours to judge: the host dead-letters it. Returns jobs and samples.
local function keep(stream, entries)
  local runs, jobs, settled, kept, samples = {}, {}, {}, 0, 0
  for at, entry in ipairs(entries) do runs[at], jobs[at] = field(entry[2], 'run'), field(entry[2], 'job') end
  local open = are_open(runs, jobs, #entries)
  for at, entry in ipairs(entries) do
    local id, fields = entry[1], entry[2]
    if open[at] == false then
      settled[#settled + 1] = id
    else
      found[#found + 1] = {stream, id, fields}
      kept, samples = kept + 1, samples + samples_of(fields)
    end
  end
  for from = 1, #settled, AT_ONCE do
    local upto = math.min(from + AT_ONCE - 1, #settled)
    redis.call('XACK', stream, GROUP, unpack(settled, from, upto))
    redis.call('XDEL', stream, unpack(settled, from, upto))
  end
  discarded = discarded + #settled
  return kept, samples
end

local function take_backlog(stream, count)
  local kept, samples = 0, 0
  if redis.call('TYPE', stream).ok ~= 'stream' then return kept, samples end
  while kept < count and discarded < MOST_DISCARDED do
    local entries = read(stream, count - kept)
    if #entries == 0 then break end
    local more, made = keep(stream, entries)
    kept, samples = kept + more, samples + made
  end
  return kept, samples
end

-- Once a call for each run: what waited for a policy that this host serves.
local function release_served(run)
  if run.looked_at or released >= MOST_RELEASED then return end
  run.looked_at = true
  local parked, exact = key('parked', run.name), key('exact', run.name)
  if redis.call('EXISTS', parked, exact) == 0 then return end
  local newest, versions = string.match(run.offer, '^(%d+):(.*)$')
  released = released + release(parked, '-inf', newest, wanted)
  for version in string.gmatch(versions, '%d+') do released = released + release(exact, version, version, wanted) end
end

local function take(run, lane, count)
  release_served(run)
  local kept, samples = take_waiting(run.name, lane, count)
  if kept == count then return kept, samples end
  local more, made = take_backlog(key('jobs', run.name, lane), count - kept)
  return kept + more, samples + made
end

local fair = number(try('GET', key('fair')), 0, 1e300, 0)
local fair_before = fair

-- True where entries or names are left of jobs that were ended from outside, or somebody added some by hand.
local function has_remains(run)
  for _, lane in ipairs(LANES) do
    if (try('XLEN', key('jobs', run, lane)) or 0) > 0 then return true end
  end
  return redis.call('EXISTS', key('ready', run, 'high'), key('ready', run, 'default'), key('ready', run, 'low'),
    key('parked', run), key('exact', run)) > 0
end

-- The runs to look at. `drained` counts the lanes in which a run had nothing more; one that is over the bound has nothing.
local function active_runs()
  local active = {}
  for at = 5, #ARGV, 2 do
    local facts = try('HMGET', key('runs', ARGV[at]), 'open', 'unread', 'weight', 'pass') or {}
    local run, pass = {name = ARGV[at], offer = ARGV[at + 1], drained = 0}, number(facts[4], 0, 1e300, fair)
    run.weight, run.pass, run.pass_before = number(facts[3], 1e-6, 1e6, 1), pass, pass
    run.open = number(facts[1], 1, 1e300, 0) > 0
    run.over = bound > 0 and number(facts[2], 0, 1e300, 0) >= bound
    if run.over then full[#full + 1] = run.name end
    if run.open or (not run.over and has_remains(run.name)) then active[#active + 1] = run end
  end
  return active
end

local function by_pass(one, other)
  if one.pass ~= other.pass then return one.pass < other.pass end
  return one.name < other.name
end

-- Back to where it belongs what is at `first` and has moved on; the rest of the queue is in order.
local function reorder(queue, first)
  local run, at = queue[first], first
  while queue[at + 1] and by_pass(queue[at + 1], run) do
    queue[at] = queue[at + 1]
    at = at + 1
  end
  queue[at] = run
end

local function serve_lane(runs, lane)
  local queue, weights, first = {}, 0, 1
  for _, run in ipairs(runs) do
    if not run.over then queue[#queue + 1], weights = run, weights + run.weight end
  end
  table.sort(queue, by_pass)
  while #found < wanted and queue[first] and discarded < MOST_DISCARDED do
    local run, left = queue[first], wanted - #found
    local share = math.min(left, math.max(1, math.ceil(left * run.weight / weights)))
    local kept, samples = take(run, lane, share)
    if kept > 0 then
      fair = math.max(fair, run.pass)
      run.pass = run.pass + samples / run.weight
    end
    if kept < share then
      weights, first, run.drained = weights - run.weight, first + 1, run.drained + 1
    else
      reorder(queue, first)
    end
  end
end

-- What others left to this host, and is still there for it.
local function release_passed()
  local passed, delayed = key('passed', string.match(consumer, '^(.*):') or consumer), key('delayed')
  local left = try('ZRANGEBYSCORE', passed, '-inf', '+inf', 'WITHSCORES', 'LIMIT', 0, wanted) or {}
  for at = 1, #left, 2 do
    local name = left[at]
    redis.call('ZREM', passed, name)
    if try('ZSCORE', delayed, name) == left[at + 1] then
      redis.call('ZREM', delayed, name)
      to_ready(name)
    end
  end
end

release_passed()
release(key('delayed'), '-inf', now_ms(), wanted)
local runs, lanes = active_runs(), 0
for _, lane in ipairs(LANES) do
  if #found < wanted then
    serve_lane(runs, lane)
    lanes = lanes + 1
  end
end
claim_moved()
local stopped = #found < wanted and discarded >= MOST_DISCARDED
for _, run in ipairs(runs) do
  -- What has nothing to be served saves nothing up; what waits in a lane that was not reached does not compete either.
  if run.over or (lanes > 0 and run.drained == lanes and not stopped) then run.pass = math.max(run.pass, fair) end
  -- pcall: a server without memory gives out jobs all the same.
  if run.open and run.pass ~= run.pass_before then redis.pcall('HSET', key('runs', run.name), 'pass', run.pass) end
end
if fair > fair_before then redis.pcall('SET', key('fair'), fair) end
return {found, full, stopped and 1 or 0}
