-- Look at some of the results of a batch, and change nothing.
-- KEYS[1] runs; ARGV: run, batch, id of the entry to go on after ('-' for none), how many.
-- Results are only added until a batch is committed, so a page is as good as a look at all of them in one moment.
-- Returns {last id ('' at the end), bytes of their bodies, their jobs, and of those whose outcome is not the recorded
--   one: job, outcome of the result and recorded outcome, in turn}.
local run, batch, after, most = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local entries = redis.call('XRANGE', key('results', run, batch), after == '-' and '-' or '(' .. after, '+', 'COUNT', most)
local bytes, jobs, wrong = 0, {}, {}
for _, entry in ipairs(entries) do
  local fields = entry[2]
  for at = 1, #fields, 2 do
    if string.find(fields[at], '^body') then bytes = bytes + #fields[at + 1] end
  end
  local job, outcome = field(fields, 'job') or '', field(fields, 'outcome') or ''
  local _, index = parse(job)
  local recorded = redis.call('HGET', key('batches', run, batch), index or '') or 'nothing'
  jobs[#jobs + 1] = job
  if recorded ~= outcome then
    for _, value in ipairs({job, outcome, recorded}) do wrong[#wrong + 1] = value end
  end
end
return {#entries == most and entries[#entries][1] or '', bytes, jobs, wrong}
