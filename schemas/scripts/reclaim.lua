-- Take from a lost consumer what it held; the jobs go first in their lanes, each with one more loss.
-- KEYS[1] runs; ARGV: stream, idle limit in ms, consumer prefix ('' takes any), the caller, at most, and a line for the
--   history of each job.
-- The caller's own entries count too: one it does not renew is one whose delivery it never saw (a lost reply).
-- With a prefix the caller has proved that those consumers ended; else only entries idle for a whole lease are taken.
-- A loss costs one attempt of the infrastructure's budget. Machines are lost far more often than jobs kill them, so two
-- losses change nothing else; after the third a job runs in small company, after the fourth alone, and the loss of a
-- worker that had nothing but such a job is a fault of that job instead; one that still waits for the others to leave has
-- done nothing.
-- Consumers left with nothing pending are deleted when they too have been idle for the limit.
-- Returns the number of jobs taken.
local stream, idle, prefix, caller = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
local most, line = tonumber(ARGV[5]), ARGV[6]
local taken = 0
-- Bytes of history kept, as worker/suspects.py has it; and the company after the third loss: a host's usual one told apart
-- in two more losses, within the five attempts that are the default.
local HISTORY, SMALL = 4000, 8

local function company_after(losses, allowed)
  if losses >= 4 then return 1 end
  if losses == 3 then return math.min(allowed > 0 and allowed or SMALL, SMALL) end
  return allowed > 0 and allowed or ''
end

-- Whether a consumer holds one job and no other, on whatever stream. Before any of them is taken: `retries`, where every
-- suspect is, is looked at before the lanes.
local function holds_one(consumer)
  local names, held = {key('retries')}, 0
  for _, run in ipairs(redis.call('SMEMBERS', KEYS[1])) do
    for _, lane in ipairs(LANES) do names[#names + 1] = key('jobs', run, lane) end
  end
  for _, name in ipairs(names) do
    local pending = redis.pcall('XPENDING', name, GROUP, '-', '+', 2, consumer)
    if not pending.err then held = held + #pending end
    if held > 1 then return false end
  end
  return true
end

local function charged(fields, consumer, alone)
  local kept, allowed = without_carried(fields), count_of(fields, 'company')
  local attempts, faults = count_of(fields, 'attempts'), count_of(fields, 'faults')
  local losses = count_of(fields, 'losses') + 1
  if allowed ~= 1 then
    attempts = attempts + 1
  elseif alone then
    faults = faults + 1
  end
  local history = field(fields, 'history') or ''
  if line ~= '' then history = string.sub(history .. line .. '\n', -HISTORY) end
  local carried = {
    'attempts', attempts, 'faults', faults, 'losses', losses, 'company', company_after(losses, allowed),
    'avoid', string.match(consumer, '^(.*):') or '', 'history', history,
    'passed', field(fields, 'passed') or '', 'done', field(fields, 'done') or '',
  }
  for _, value in ipairs(carried) do kept[#kept + 1] = tostring(value) end
  return kept
end

local function take(consumer)
  local alone = holds_one(consumer)
  for _, row in ipairs(redis.call('XPENDING', stream, GROUP, 'IDLE', idle, '-', '+', most - taken, consumer)) do
    local entry = redis.call('XRANGE', stream, row[1], row[1])[1]
    local open = entry and is_open(field(entry[2], 'run'), field(entry[2], 'job'))
    redis.call('XACK', stream, GROUP, row[1])
    redis.call('XDEL', stream, row[1])
    if open then
      wait(charged(entry[2], consumer, alone), stream, 'ready')
    elseif entry and open == nil then  -- not ours to judge: a host that lives dead-letters it
      redis.call('XADD', stream, '*', unpack(entry[2], 1, math.min(#entry[2], AT_ONCE)))
    end
    taken = taken + 1
  end
end

-- By name and not by place: Redis 7.2 added a field, and a later one may add more.
local function by_name(row)
  local fields = {}
  for at = 1, #row, 2 do fields[row[at]] = row[at + 1] end
  return fields
end

local consumers = redis.pcall('XINFO', 'CONSUMERS', stream, GROUP)
if consumers.err then return 0 end
for _, row in ipairs(consumers) do
  local consumer = by_name(row)
  if prefix == '' or string.sub(consumer.name, 1, #prefix) == prefix then
    if consumer.pending > 0 and taken < most then
      take(consumer.name)
    elseif consumer.name ~= caller and consumer.pending == 0 and consumer.idle > 10 * idle then
      redis.call('XGROUP', 'DELCONSUMER', stream, GROUP, consumer.name)
    end
  end
end
return taken
