-- Return to its lane what a lost consumer held; each job is charged one attempt of the infrastructure budget.
-- KEYS[1] jobs:RUN:LANE; ARGV: idle limit in ms, consumer prefix ('' takes any), the caller, at most.
-- The caller's own entries count too: one it does not renew is one whose delivery it never saw (a lost reply).
-- With a prefix the caller has proved that those consumers ended; else only entries idle for a whole lease are taken.
-- Consumers left with nothing pending are deleted when they too have been idle for the limit.
-- Returns the number of jobs returned.
local stream, idle, prefix, caller, most = KEYS[1], tonumber(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4])
local taken = 0

local function charged(fields)
  local kept, attempts = {}, 0
  -- No entry of ours has so many; unpack below would fail on one that somebody added by hand.
  for at = 1, math.min(#fields, 1000), 2 do
    if fields[at] == 'attempts' then
      attempts = tonumber(fields[at + 1]) or 0
    else
      kept[#kept + 1] = fields[at]
      kept[#kept + 1] = fields[at + 1]
    end
  end
  kept[#kept + 1] = 'attempts'
  kept[#kept + 1] = attempts + 1
  return kept
end

local function take(consumer)
  local pending = redis.call('XPENDING', stream, 'workers', 'IDLE', idle, '-', '+', most - taken, consumer)
  for _, row in ipairs(pending) do
    local entry = redis.call('XRANGE', stream, row[1], row[1])[1]
    redis.call('XACK', stream, 'workers', row[1])
    redis.call('XDEL', stream, row[1])
    if entry then redis.call('XADD', stream, '*', unpack(charged(entry[2]))) end
    taken = taken + 1
  end
end

-- By name and not by place: Redis 7.2 added a field, and a later one may add more.
local function by_name(row)
  local fields = {}
  for at = 1, #row, 2 do fields[row[at]] = row[at + 1] end
  return fields
end

local consumers = redis.pcall('XINFO', 'CONSUMERS', stream, 'workers')
if consumers.err then return 0 end
for _, row in ipairs(consumers) do
  local consumer = by_name(row)
  if prefix == '' or string.sub(consumer.name, 1, #prefix) == prefix then
    if consumer.pending > 0 and taken < most then
      take(consumer.name)
    elseif consumer.name ~= caller and consumer.pending == 0 and consumer.idle > 10 * idle then
      redis.call('XGROUP', 'DELCONSUMER', stream, 'workers', consumer.name)
    end
  end
end
return taken
