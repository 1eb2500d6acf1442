-- End open jobs of one batch from outside, wherever they are: cancelled by the trainer, say.
-- KEYS[1] runs; ARGV: run, batch, outcome, error, first index, last index, entries looked at by one call, at most.
-- Hosts discard what waits when they meet it, and stop what runs when they hear of it on the channel `ended`.
-- Returns {jobs ended, the index to go on from}; -1: all are done.
local run, batch, outcome, error_text = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local first, last, most = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local size, parts = unpack(redis.call('HMGET', key('batches', run, batch), 'size', 'parts'))
first, last = math.max(first, 0), math.min(last, tonumber(size or 0) - 1)
local upto = math.min(last, first + math.max(1, math.floor(most / tonumber(parts or 1))) - 1)
local ended = finish(run, batch, first, upto, outcome, error_text)
if ended > 0 then tell_ended(run, batch) end
return {ended, upto < last and upto + 1 or -1}
