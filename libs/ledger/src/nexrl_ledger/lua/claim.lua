-- Takes a job: that of `job_id`, or the head of the queue. Returns {'OK', its id}, {'NONE'},
-- {'FENCED'}, or {'GONE'} where the record of the job has gone.
-- args: now, epoch (of a group's consumer alone), job_id (none: the head), stale_before (none: no
-- running job), held (operations that are not to start yet)
local waiting, group = unpack(KEYS)
if args.epoch then
  local epoch, state = unpack(redis.call('HMGET', group, 'epoch', 'state'))
  if epoch ~= args.epoch or state == 'down' or state == 'destroyed' then return {'FENCED'} end
end
local id = args.job_id or redis.call('ZRANGE', waiting, 0, 0)[1]
if not id then return {'NONE'} end
local job = common.job_prefix .. id
local state, operation, lease = unpack(redis.call('HMGET', job, 'state', 'operation', 'lease_at'))
if not state then
  redis.call('ZREM', waiting, id)
  return {'GONE'}
end
if state == 'queued' then
  for _, held in ipairs(args.held) do
    if held == operation then return {'NONE'} end
  end
elseif state ~= 'running' or not args.stale_before
  or tonumber(lease or '0') >= tonumber(args.stale_before) then
  return {'NONE'}
end
redis.call('HINCRBY', job, 'attempt', 1)
redis.call('HSET', job, 'state', 'running', 'started_at', args.now, 'lease_at', args.now)
redis.call('HDEL', job, 'waits_for')
if args.epoch then
  redis.call('HSET', job, 'epoch', args.epoch)
  redis.call('HSET', group, 'running_job', id)
end
return {'OK', id}
