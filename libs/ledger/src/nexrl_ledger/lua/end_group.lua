-- The group goes down (its first cause stays) or is destroyed, and every job that still waits for
-- it ends: a destroy has what it asks for, the others fail. Returns 'FENCED' or the group's state:
-- one that goes down while a destroy waits is destroyed.
-- args: epoch (none: any), state, cause (may be none), now, running_error, queued_error,
-- seq (what of its weights is left; none: all)
local group, waiting, applied, groups, destroyed = unpack(KEYS)
local epoch, before = unpack(redis.call('HMGET', group, 'epoch', 'state'))
local state = args.state
if not before or (before == 'destroyed' and state ~= before) then return 'FENCED' end
if args.epoch and epoch ~= args.epoch then return 'FENCED' end
for _, id in ipairs(redis.call('ZRANGE', waiting, 0, -1)) do
  local job = common.job_prefix .. id
  local operation, job_state = unpack(redis.call('HMGET', job, 'operation', 'state'))
  if operation == 'destroy' then
    state = 'destroyed'
    end_job(id, {'state', 'finished', 'finished_at', args.now, 'result', '{}'})
  else
    local why = job_state == 'running' and args.running_error or args.queued_error
    end_job(id, {'state', 'failed', 'finished_at', args.now, 'error', why})
  end
  redis.call('ZREM', waiting, id)
end
redis.call('HSET', group, 'state', state)
if args.cause and before ~= state then redis.call('HSET', group, 'cause', args.cause) end
if args.seq then roll_back(group, applied, args.seq) end
redis.call('HDEL', group, 'running_job')
if state == 'destroyed' then
  local identifier = redis.call('HGET', group, 'identifier')
  redis.call('SREM', groups, identifier)
  redis.call('ZADD', destroyed, 'NX', args.now, identifier)
  redis.call('EXPIRE', destroyed, common.result_ttl)
  redis.call('EXPIRE', group, common.result_ttl)
  redis.call('DEL', applied)
end
return state
