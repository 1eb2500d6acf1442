-- A trainer has read results up to here: they no longer count against the bound on unread results.
-- KEYS[1] runs; ARGV: run, batch, bytes of results read in all.
local run, batch = ARGV[1], ARGV[2]
local states = key('batches', run, batch)
local bytes, before, committed = unpack(redis.call('HMGET', states, 'bytes', 'read', 'committed'))
before = tonumber(before or 0)
local read = math.min(tonumber(ARGV[3]), tonumber(bytes or 0))
if committed or read <= before then return 0 end
redis.call('HSET', states, 'read', read)
write('HINCRBY', key('runs', run), 'unread', before - read)
return 1
