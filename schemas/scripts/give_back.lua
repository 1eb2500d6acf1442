-- Give jobs back unsettled: from this consumer to a place to wait.
-- KEYS[1] runs; ARGV[1] consumer; then for each job: stream, entry id, place (ready, delayed, parked, exact or passed), score,
--   how many values follow, and these: the fields it carries from now on and their values, in turn.
-- A job that another consumer holds by now, or that is settled, is left alone.
-- Returns one value a job: 1 given back, 0 not ours any more.
local consumer, replies, at = ARGV[1], {}, 2
while at <= #ARGV do
  local stream, id, place, score, count = unpack(ARGV, at, at + 4)
  local first, last = at + 5, at + 4 + tonumber(count)
  at = last + 1
  local given = 0
  -- pcall: the stream or its group may be gone (FLUSHALL, a failover); then nothing is held there.
  local pending = redis.pcall('XPENDING', stream, GROUP, id, id, 1, consumer)
  if not pending.err and #pending == 1 then
    local entry = redis.call('XRANGE', stream, id, id)[1]
    redis.call('XACK', stream, GROUP, id)
    redis.call('XDEL', stream, id)
    if entry and is_open(field(entry[2], 'run'), field(entry[2], 'job')) then
      local fields = without_carried(entry[2])
      for value = first, last do fields[#fields + 1] = ARGV[value] end
      wait(fields, stream, place, score)
      given = 1
    end
  end
  replies[#replies + 1] = given
end
return replies
