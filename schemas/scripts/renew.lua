-- Renew leases, fenced: only entries this consumer still holds, of jobs that are still open.
-- KEYS[1] runs; ARGV: stream, consumer, then for each entry: its id, run and job.
-- A plain XCLAIM would take an entry back from the host that reclaimed it. An entry of a job that was settled elsewhere
-- (cancelled, or finished by another host) is removed.
-- Returns the entry ids that are lost.
local stream, consumer = ARGV[1], ARGV[2]

-- The first and the last id of this call: what this consumer holds between them takes one command, not one an entry.
local function span()
  local first, last, first_ms, first_seq, last_ms, last_seq
  for at = 3, #ARGV, 3 do
    local ms, seq = string.match(ARGV[at], '^(%d+)-(%d+)$')
    ms, seq = tonumber(ms), tonumber(seq)
    if ms and (not first or ms < first_ms or (ms == first_ms and seq < first_seq)) then
      first, first_ms, first_seq = ARGV[at], ms, seq
    end
    if ms and (not last or ms > last_ms or (ms == last_ms and seq > last_seq)) then
      last, last_ms, last_seq = ARGV[at], ms, seq
    end
  end
  return first, last
end

local function held()
  local ids, first, last = {}, span()
  while first do
    local pending = redis.pcall('XPENDING', stream, GROUP, first, last, AT_ONCE, consumer)
    if pending.err then break end  -- the stream or its group is gone (FLUSHALL, a failover)
    for _, row in ipairs(pending) do ids[row[1]] = true end
    first = #pending == AT_ONCE and '(' .. pending[#pending][1] or nil
  end
  return ids
end

local function remove(ids)
  for from = 1, #ids, AT_ONCE do
    local upto = math.min(from + AT_ONCE - 1, #ids)
    redis.call('XACK', stream, GROUP, unpack(ids, from, upto))
    redis.call('XDEL', stream, unpack(ids, from, upto))
  end
end

local ids, runs, jobs, asked = held(), {}, {}, 0
for at = 3, #ARGV, 3 do
  asked = asked + 1
  if ids[ARGV[at]] then runs[asked], jobs[asked] = ARGV[at + 1], ARGV[at + 2] end
end
local open = are_open(runs, jobs, asked)
local mine, lost, settled = {}, {}, {}
for number_of_entry = 1, asked do
  local id = ARGV[3 * number_of_entry]
  if ids[id] and open[number_of_entry] ~= false then
    mine[#mine + 1] = id
  else
    lost[#lost + 1] = id
    if ids[id] then settled[#settled + 1] = id end
  end
end
remove(settled)
for first = 1, #mine, AT_ONCE do
  local some = {unpack(mine, first, math.min(first + AT_ONCE - 1, #mine))}
  some[#some + 1] = 'JUSTID'
  redis.call('XCLAIM', stream, GROUP, consumer, 0, unpack(some))
end
return lost
