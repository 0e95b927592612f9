-- Begins to read a result; the time that it is kept after a delivery begins again. Returns 0 where
-- it is being removed, else 1: one that is not among the delivered is kept anyway.
-- args: job_id, now
local delivered = unpack(KEYS)
local since = redis.call('ZSCORE', delivered, args.job_id)
if since == 'inf' then return 0 end
if since then redis.call('ZADD', delivered, args.now, args.job_id) end
return 1
