-- Pull jobs for one host, lane by lane. What was parked for a policy it serves, or waited for a time that is over, goes
-- back to the end of its lane first.
-- KEYS: parked (sorted set), delayed (sorted set), then jobs streams in the order to read them.
-- ARGV: consumer, jobs wanted, policy version served, prefix of batch keys.
-- Entries whose job is settled already (cancelled, or finished by another host) are discarded here.
-- Returns a list of {stream, entry id, {field, value, ...}}.
local consumer, wanted, version, batches = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]

-- A job that waited goes back to its stream and, where that stream is empty, straight to this host below.
local function release(waiting, upto)
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', waiting, '-inf', upto, 'LIMIT', 0, wanted)) do
    redis.call('ZREM', waiting, member)
    local job = cmsgpack.unpack(member)
    redis.call('XADD', job[1], '*', unpack(job[2]))
  end
end

local function open(fields)
  local run, job
  for at = 1, #fields, 2 do
    if fields[at] == 'run' then run = fields[at + 1] elseif fields[at] == 'job' then job = fields[at + 1] end
  end
  local batch, index = string.match(job or '', '^(.*)/(%d+)$')
  if not run or not batch then return true end  -- not ours to judge: the host dead-letters it
  return redis.call('HGET', batches .. run .. ':' .. batch, index) == 'open'
end

local function read(stream, count)
  local reply = redis.pcall('XREADGROUP', 'GROUP', 'workers', consumer, 'COUNT', count, 'STREAMS', stream, '>')
  if reply and reply.err then
    if not string.find(reply.err, 'NOGROUP') then return reply end
    -- The server lost the stream (FLUSHALL, a failover): begin it again at its first entry.
    redis.call('XGROUP', 'CREATE', stream, 'workers', '0', 'MKSTREAM')
    return read(stream, count)
  end
  return reply and reply[1][2] or {}
end

local time = redis.call('TIME')
release(KEYS[1], version)
release(KEYS[2], time[1] * 1000 + math.floor(time[2] / 1000))
local found = {}
for at = 3, #KEYS do
  while #found < wanted do
    local entries = read(KEYS[at], wanted - #found)
    if entries.err then return entries end
    for _, entry in ipairs(entries) do
      if open(entry[2]) then
        found[#found + 1] = {KEYS[at], entry[1], entry[2]}
      else
        redis.call('XACK', KEYS[at], 'workers', entry[1])
        redis.call('XDEL', KEYS[at], entry[1])
      end
    end
    if #entries == 0 then break end
  end
end
return found
