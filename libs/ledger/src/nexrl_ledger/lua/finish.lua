-- Ends a claimed job. Returns 'OK' or 'FENCED'.
-- args: job_id, attempt, epoch (of a group's consumer alone), seq (none: the weights are as they
-- were), state (how it ends), fields (name, value, ...)
local job, group, applied = unpack(KEYS)
if redis.call('HGET', job, 'attempt') ~= args.attempt then return 'FENCED' end
if args.epoch and redis.call('HGET', group, 'epoch') ~= args.epoch then return 'FENCED' end
local state = redis.call('HGET', job, 'state')
-- After a lost reply the caller says it again: the job has ended, and that was the caller.
if state ~= 'running' then return state == args.state and 'OK' or 'FENCED' end
end_job(args.job_id, args.fields)
if args.epoch then redis.call('HDEL', group, 'running_job') end
if args.seq then
  redis.call('HSET', group, 'seq', args.seq)
  redis.call('ZADD', applied, args.seq, args.job_id)
  redis.call('ZREMRANGEBYRANK', applied, 0, -4097)
end
return 'OK'
