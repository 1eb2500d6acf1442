-- Look at a whole pool in one moment and change nothing: where each open job is, what the counters say, which keys there are.
-- KEYS[1] runs; ARGV: how many of each kind of trouble are named, 1 to tell what is left behind too, then three for each
--   kind of key: its name, how many names follow it, its type ('*' for the number: one, which may hold colons).
-- A piece is an open job, or an unfinished part of one whose group is split. `wanted` holds all pieces: true until it is
-- found in a place, then the place. What is left true in the end is lost.
-- Returns, as msgpack, {runs = facts of each run, trouble = {kind = {count, {{subject, detail}, ...}}},
--   results = {{run, batch, entries, bytes}, ...}, counts = {what = number}}; no body of a job or a result.
local NAMED, QUIESCENT = tonumber(ARGV[1]), ARGV[2] == '1'
local OUTCOMES = {'ok', 'failed', 'stale', 'expired', 'cancelled'}
-- Entries read at once, bodies included: what bounds the memory this takes.
local PAGE = 100

local trouble, counts = {}, {keys = 0, dead = 0, tombstones = 0, foreign = 0}

local function note(kind, subject, detail)
  local found = trouble[kind] or {0, {}}
  trouble[kind] = found
  found[1] = found[1] + 1
  if found[1] <= NAMED then table.insert(found[2], {subject, detail or ''}) end
end

local function count(what, amount) counts[what] = (counts[what] or 0) + amount end

local function figure(value) return number(value, -1e300, 1e300, 0) end

local function short(name) return string.sub(name, #PREFIX + 1) end

-- By name and not by place: later servers add fields.
local function by_name(flat)
  local fields = {}
  for at = 1, #flat, 2 do fields[flat[at]] = flat[at + 1] end
  return fields
end

-- Keys.

local types, found = {}, {}
for at = 3, #ARGV, 3 do
  types[ARGV[at] .. '/' .. ARGV[at + 1]] = ARGV[at + 2]
  found[ARGV[at]] = {}
end
-- Full names of those that have the type they must have.
local sound = {}

local function sort_key(name)
  local kind, rest = string.match(short(name), '^([^:]+):?(.*)$')
  local names = {}
  for each in string.gmatch(rest or '', '[^:]+') do names[#names + 1] = each end
  local must = types[(kind or '') .. '/' .. #names]
  if not must and #names > 0 then must = types[(kind or '') .. '/*'] end
  if not must then return note('key-unknown', name, redis.call('TYPE', name).ok) end
  local is = redis.call('TYPE', name).ok
  if is ~= must then return note('key-type', name, 'is a ' .. is .. ' and must be a ' .. must) end
  sound[name] = true
  table.insert(found[kind], names)
end

local cursor, met = '0', {}
repeat
  local reply = redis.call('SCAN', cursor, 'MATCH', PREFIX .. '*', 'COUNT', AT_ONCE)
  cursor = reply[1]
  for _, name in ipairs(reply[2]) do
    if not met[name] then  -- a scan may show a key twice
      met[name] = true
      count('keys', 1)
      sort_key(name)
    end
  end
until cursor == '0'

-- Runs: those that hosts look at, and whatever else has keys.

local runs, listed = {}, {}

local function facts_of(run)
  if not runs[run] then
    runs[run] = {
      run = run, listed = listed[run] or false, expires = false, counters = {}, batches = 0, committed = 0, open = 0,
      pieces = 0, unread = 0, backlog = 0, in_flight = 0, ready = 0, delayed = 0, parked = 0, exact = 0, tombstones = 0,
    }
  end
  return runs[run]
end

if sound[KEYS[1]] then
  for _, run in ipairs(redis.call('SMEMBERS', KEYS[1])) do listed[run] = true end
  for run in pairs(listed) do facts_of(run) end
end
for _, kind in ipairs({'jobs', 'ready', 'parked', 'exact', 'batches', 'parts', 'open', 'results', 'runs'}) do
  for _, names in ipairs(found[kind] or {}) do
    if names[1] then facts_of(names[1]) end
  end
end
for run, facts in pairs(runs) do
  local name = key('runs', run)
  if sound[name] then
    facts.counters = by_name(redis.call('HGETALL', name))
    facts.expires = redis.call('PTTL', name) >= 0
  end
end

-- Batches, and with them all pieces.

local wanted, results = {}, {}

local function want(run, piece)
  wanted[run .. ':' .. piece] = true
  runs[run].pieces = runs[run].pieces + 1
end

local function want_parts(run, batch, index, parts, done)
  local missing = 0
  for part = 0, parts - 1 do
    if not done[index .. '#' .. part] then
      want(run, batch .. '/' .. index .. '#' .. part)
      missing = missing + 1
    end
  end
  if missing == 0 then note('parts-complete', run .. ':' .. batch .. '/' .. index) end
end

local function check_parts(run, batch, states, parts, done)
  for field_name in pairs(done) do
    local index, part = string.match(field_name, '^(%d+)#(%d+)$')
    if not index or states[index] ~= 'open' or tonumber(part) >= parts then
      note('part-unexpected', run .. ':' .. batch, field_name)
    end
  end
end

local function examine_results(run, batch, settled, bytes)
  local name, entries = key('results', run, batch), 0
  if sound[name] then entries = redis.call('XLEN', name) end
  if entries ~= settled then
    note('batch-results', run .. ':' .. batch, entries .. ' results for ' .. settled .. ' settled jobs')
  end
  if entries > 0 then results[#results + 1] = {run, batch, entries, bytes} end
end

local function examine_open_batch(run, batch, name)
  local facts, states, seen, settled = runs[run], by_name(redis.call('HGETALL', name)), {}, 0
  local parts, where = math.max(1, figure(states.parts)), run .. ':' .. batch
  local done = {}
  if sound[key('parts', run, batch)] then
    for _, each in ipairs(redis.call('HKEYS', key('parts', run, batch))) do done[each] = true end
  end
  local jobs = 0
  for index, state in pairs(states) do
    if string.find(index, '^%d+$') then
      jobs = jobs + 1
      seen[state] = (seen[state] or 0) + 1
      if state ~= 'open' then
        settled = settled + 1
      elseif parts == 1 then
        want(run, batch .. '/' .. index)
      else
        want_parts(run, batch, index, parts, done)
      end
    end
  end
  check_parts(run, batch, states, parts, done)
  if figure(states.size) ~= jobs then
    note('batch-counts', where, 'its size is ' .. (states.size or 0) .. ', and it has the states of ' .. jobs .. ' jobs')
  end
  local names = {'open', unpack(OUTCOMES)}
  for _, outcome in ipairs(names) do
    local counted, really = figure(states[outcome]), seen[outcome] or 0
    if counted ~= really then note('batch-counts', where, 'it counts ' .. counted .. ' ' .. outcome .. ', ' .. really .. ' are') end
    seen[outcome] = nil
  end
  for state in pairs(seen) do note('batch-counts', where, 'a job has the state ' .. state) end
  local bytes, read = figure(states.bytes), figure(states.read)
  if read > bytes then note('batch-read', where, read .. ' bytes of ' .. bytes) end
  facts.batches, facts.unread = facts.batches + 1, facts.unread + bytes - read
  facts.open = facts.open + jobs - settled
  if redis.call('PTTL', name) >= 0 then note('batch-expires', where) end
  if not sound[key('open', run)] or not redis.call('ZSCORE', key('open', run), batch) then note('batch-unlisted', where) end
  if QUIESCENT then note('left', name, 'not committed, open jobs: ' .. (jobs - settled)) end
  examine_results(run, batch, settled, bytes)
end

local uncommitted = {}
for _, names in ipairs(found.batches) do
  local run, batch = names[1], names[2]
  local name = key('batches', run, batch)
  local open, committed = unpack(redis.call('HMGET', name, 'open', 'committed'))
  if not committed then
    uncommitted[run .. ':' .. batch] = true
    examine_open_batch(run, batch, name)
  else
    runs[run].committed = runs[run].committed + 1
    if figure(open) ~= 0 then note('batch-counts', run .. ':' .. batch, 'committed with ' .. open .. ' open jobs') end
    if redis.call('PTTL', name) < 0 then note('batch-stays', run .. ':' .. batch) end
  end
end
for _, names in ipairs(found.open) do
  for _, batch in ipairs(redis.call('ZRANGE', key('open', names[1]), 0, -1)) do
    if not uncommitted[names[1] .. ':' .. batch] then note('batch-missing', names[1] .. ':' .. batch) end
  end
end
for _, kind in ipairs({'results', 'parts'}) do
  for _, names in ipairs(found[kind]) do
    if not uncommitted[names[1] .. ':' .. names[2]] then note('orphan', key(kind, names[1], names[2])) end
  end
end

-- Places.

-- A job was found in a place, `at` it under `id`; tells whether it is open.
local function place(run, job, kind, at, id)
  local piece = run .. ':' .. job
  local before = wanted[piece]
  if not before then return false end
  if before ~= true then note('twice', piece, before .. ' and ' .. at .. (id ~= '' and ' ' .. id or '')) end
  wanted[piece] = at
  runs[run][kind] = runs[run][kind] + 1
  return true
end

-- ID -> consumer of what is in somebody's hands, and the last id that was given to anybody.
local function held_of(stream)
  local held, last, from = {}, '0-0', '-'
  for _, row in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local group = by_name(row)
    if group.name == GROUP then last = group['last-delivered-id'] end
  end
  if last == '0-0' then return held, last end
  while true do
    local rows = redis.call('XPENDING', stream, GROUP, from, '+', AT_ONCE)
    for _, row in ipairs(rows) do held[row[1]] = row[2] end
    if #rows < AT_ONCE then return held, last end
    from = '(' .. rows[#rows][1]
  end
end

local function is_after(id, other)
  local ms, number = string.match(id, '^(%d+)-(%d+)$')
  local other_ms, other_number = string.match(other, '^(%d+)-(%d+)$')
  ms, other_ms = tonumber(ms), tonumber(other_ms)
  return ms > other_ms or (ms == other_ms and tonumber(number) > tonumber(other_number))
end

-- `kind` says where an entry is that nobody was given yet; nil: it must not be.
local function examine_stream(stream, kind, owner)
  local held, last = held_of(stream)
  local name, from, new = short(stream), '-', false
  while true do
    local entries = redis.call('XRANGE', stream, from, '+', 'COUNT', PAGE)
    for _, entry in ipairs(entries) do
      local id, fields = entry[1], entry[2]
      local run, job = field(fields, 'run'), field(fields, 'job')
      new = new or is_after(id, last)
      if not new and not held[id] then
        note('stranded', stream, id)
      elseif run and job and place(run, job, new and kind or 'in_flight', name, id) then
        if new and not kind then note('unseen', run .. ':' .. job, id) end
      elseif not run or not parse(job) then
        count('foreign', 1)
      elseif owner then
        owner.tombstones = owner.tombstones + 1
      else
        count('tombstones', 1)
      end
      held[id] = nil
    end
    if #entries < PAGE then break end
    from = '(' .. entries[#entries][1]
  end
  for id, consumer in pairs(held) do note('pending-gone', stream, id .. ' of ' .. consumer) end
  if QUIESCENT and redis.call('XLEN', stream) > 0 then note('left', stream, 'entries: ' .. redis.call('XLEN', stream)) end
end

for _, names in ipairs(found.jobs) do
  examine_stream(key('jobs', names[1], names[2]), 'backlog', runs[names[1]])
end
if sound[key('retries')] then examine_stream(key('retries'), nil, nil) end

-- NAME -> true until it is met in a place.
local waiting = {}
if sound[key('waiting')] then
  for _, name in ipairs(redis.call('HKEYS', key('waiting'))) do waiting[name] = true end
end

local function examine_names(names, kind, at)
  for _, name in ipairs(names) do
    local run, job = string.match(name, '^([^:]+):[^:]+:(.+)$')
    if waiting[name] == nil then
      count('tombstones', 1)
    else
      waiting[name] = false
      if not (run and place(run, job, kind, at, '')) then note('waiting-settled', name, at) end
    end
  end
end

for _, names in ipairs(found.ready) do
  local name = key('ready', names[1], names[2])
  examine_names(redis.call('LRANGE', name, 0, -1), 'ready', short(name))
end
for _, kind in ipairs({'delayed', 'parked', 'exact'}) do
  for _, names in ipairs(found[kind]) do
    local name = key(kind, names[1])
    examine_names(redis.call('ZRANGE', name, 0, -1), kind, short(name))
  end
end
for name, unmet in pairs(waiting) do
  if unmet then note('waiting-nowhere', name) end
end

local lost = {}
for piece, at in pairs(wanted) do
  if at == true then lost[#lost + 1] = piece end
end
table.sort(lost)
for _, piece in ipairs(lost) do note('lost', piece) end

-- What must not be there when nothing is open and everything is committed. Batches and streams were told above.
if QUIESCENT then
  for _, kind in ipairs({'results', 'parts', 'open', 'ready', 'delayed', 'parked', 'exact', 'waiting', 'deadlines'}) do
    for _, names in ipairs(found[kind]) do note('left', key(kind, unpack(names)), 'it is not empty') end
  end
end

if sound[key('dead')] then counts.dead = redis.call('XLEN', key('dead')) end
local listed_facts = {}
for _, facts in pairs(runs) do listed_facts[#listed_facts + 1] = facts end
return cmsgpack.pack({runs = listed_facts, trouble = trouble, results = results, counts = counts})
