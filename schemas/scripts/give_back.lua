-- Give jobs back unsettled: from this consumer to their lane, to `parked` or to `delayed`.
-- KEYS, three a job: jobs:RUN:LANE, batches:RUN:ID, where to (the same stream, or a sorted set)
-- ARGV[1] consumer; then five a job: entry id, index, score ('' for a stream), attempts, faults
-- A job that another consumer holds by now, or that is settled, is left alone.
-- Returns one value a job: 1 given back, 0 not ours any more.
local consumer = ARGV[1]
local ARGS = 5
local replies = {}

local function with_counts(fields, attempts, faults)
  local kept = {}
  -- No entry of ours has so many; unpack below would fail on one that somebody added by hand.
  for at = 1, math.min(#fields, 1000), 2 do
    if fields[at] ~= 'attempts' and fields[at] ~= 'faults' then
      kept[#kept + 1] = fields[at]
      kept[#kept + 1] = fields[at + 1]
    end
  end
  kept[#kept + 1] = 'attempts'
  kept[#kept + 1] = attempts
  kept[#kept + 1] = 'faults'
  kept[#kept + 1] = faults
  return kept
end

for job = 0, (#ARGV - 1) / ARGS - 1 do
  local stream, batch, target = unpack(KEYS, 1 + 3 * job, 3 + 3 * job)
  local id, index, score, attempts, faults = unpack(ARGV, 2 + ARGS * job, 1 + ARGS * (job + 1))
  local given = 0
  -- pcall: the stream or its group may be gone (FLUSHALL, a failover); then nothing is held there.
  local pending = redis.pcall('XPENDING', stream, 'workers', id, id, 1, consumer)
  if not pending.err and #pending == 1 then
    local entry = redis.call('XRANGE', stream, id, id)[1]
    redis.call('XACK', stream, 'workers', id)
    redis.call('XDEL', stream, id)
    if entry and redis.call('HGET', batch, index) == 'open' then
      local fields = with_counts(entry[2], attempts, faults)
      if score == '' then
        redis.call('XADD', target, '*', unpack(fields))
      else
        redis.call('ZADD', target, score, cmsgpack.pack({stream, fields}))
      end
      given = 1
    end
  end
  replies[#replies + 1] = given
end
return replies
