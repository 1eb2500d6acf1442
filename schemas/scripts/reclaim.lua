-- Return to its lane what a lost consumer held; each job is charged one attempt of the infrastructure budget.
-- KEYS[1] jobs:RUN:LANE; ARGV: idle limit in ms, consumer prefix ('' takes any), consumer to spare, at most.
-- With a prefix the caller has proved that those consumers ended; else only entries idle for a whole lease are taken.
-- Consumers left with nothing pending are deleted when they too have been idle for the limit.
-- Returns the number of jobs returned.
local stream, idle, prefix, spare, most = KEYS[1], tonumber(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4])
local taken = 0

local function charged(fields)
  local kept, attempts = {}, 0
  for at = 1, #fields, 2 do
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

local consumers = redis.pcall('XINFO', 'CONSUMERS', stream, 'workers')
if consumers.err then return 0 end
for _, row in ipairs(consumers) do
  local name, pending, inactive = row[2], row[4], row[6]
  if name ~= spare and (prefix == '' or string.sub(name, 1, #prefix) == prefix) then
    if pending > 0 and taken < most then
      take(name)
    elseif pending == 0 and inactive > 10 * idle then
      redis.call('XGROUP', 'DELCONSUMER', stream, 'workers', name)
    end
  end
end
return taken
