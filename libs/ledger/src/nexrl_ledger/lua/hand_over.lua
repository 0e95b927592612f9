-- A claimed job leaves its group's queue and waits in another one, still running its second half
-- there. Returns 'OK' or 'FENCED'.
-- args: job_id, attempt, epoch, queue (the new one), order, fields (name, value, ...)
local job, group, from, to = unpack(KEYS)
-- After a lost reply the caller says it again; the new queue's consumer may have taken the job in
-- between, which makes it another attempt.
if redis.call('HGET', job, 'queue') == args.queue then return 'OK' end
if redis.call('HGET', job, 'attempt') ~= args.attempt then return 'FENCED' end
if redis.call('HGET', group, 'epoch') ~= args.epoch then return 'FENCED' end
if redis.call('HGET', job, 'state') ~= 'running' then return 'FENCED' end
redis.call('HSET', job, 'queue', args.queue, 'state', 'queued', unpack(args.fields))
redis.call('ZREM', from, args.job_id)
redis.call('ZADD', to, args.order, args.job_id)
redis.call('HDEL', group, 'running_job')
return 'OK'
