"""Every change of several keys is one Lua script, so that no client ever sees half of it.

``now`` is given by the caller; job hashes hold strings and JSON (see ``nexrl_contract.records``).
``end_job`` is shared text: it gives an ended job its expiry, takes it off its queue and tells the
waiters.
"""

_END_JOB = """
local function end_job(id, fields)
  local job = 'nexrl:job:' .. id
  local queue = redis.call('HGET', job, 'queue')
  if not queue then return end
  redis.call('HSET', job, unpack(fields))
  redis.call('HDEL', job, 'waits_for')
  redis.call('EXPIRE', job, RESULT_TTL)
  local key = redis.call('HGET', job, 'key')
  if key then redis.call('EXPIRE', 'nexrl:key:' .. key, TOMBSTONE_TTL) end
  redis.call('ZREM', 'nexrl:waiting:' .. queue, id)
  redis.call('PUBLISH', 'nexrl:ended', id)
end
"""

_ROLL_BACK = """
local function roll_back(group, applied, seq)
  local lost = redis.call('ZRANGEBYSCORE', applied, '(' .. seq, '+inf')
  for _, id in ipairs(lost) do
    if redis.call('EXISTS', 'nexrl:job:' .. id) == 1 then redis.call('HSET', 'nexrl:job:' .. id, 'state', 'rolled_back') end
  end
  redis.call('ZREMRANGEBYSCORE', applied, '(' .. seq, '+inf')
  if tonumber(redis.call('HGET', group, 'seq') or '0') > tonumber(seq) then redis.call('HSET', group, 'seq', seq) end
  return #lost
end
"""

CLAIM = """
-- KEYS: waiting, group ('' without one).
-- ARGV: now, epoch ('' without a group), job id ('' takes the head), stale_before, operation that is not to start yet, ...
if ARGV[2] ~= '' then
  local group = redis.call('HMGET', KEYS[2], 'epoch', 'state')
  if group[1] ~= ARGV[2] or group[2] == 'down' or group[2] == 'destroyed' then return {'FENCED'} end
end
local id = ARGV[3]
if id == '' then
  local head = redis.call('ZRANGE', KEYS[1], 0, 0)
  if #head == 0 then return {'NONE'} end
  id = head[1]
end
local job = 'nexrl:job:' .. id
local state = redis.call('HGET', job, 'state')
if not state then redis.call('ZREM', KEYS[1], id) return {'GONE'} end
local started = tonumber(redis.call('HGET', job, 'lease_at') or '0')
if state ~= 'queued' and not (state == 'running' and ARGV[4] ~= '' and started < tonumber(ARGV[4])) then return {'NONE'} end
if state == 'queued' then
  local operation = redis.call('HGET', job, 'operation')
  for i = 5, #ARGV do
    if ARGV[i] == operation then return {'NONE'} end
  end
end
local attempt = redis.call('HINCRBY', job, 'attempt', 1)
redis.call('HSET', job, 'state', 'running', 'started_at', ARGV[1], 'lease_at', ARGV[1])
redis.call('HDEL', job, 'waits_for')
if ARGV[2] ~= '' then
  redis.call('HSET', job, 'epoch', ARGV[2])
  redis.call('HSET', KEYS[2], 'running_job', id)
end
return {'OK', id, attempt}
"""

FINISH = (
    _END_JOB
    + """
-- KEYS: job, group, applied. ARGV: job id, attempt, epoch ('' without a group), seq ('' if nothing was applied), field, value, ...
if redis.call('HGET', KEYS[1], 'attempt') ~= ARGV[2] then return 'FENCED' end
if ARGV[3] ~= '' and redis.call('HGET', KEYS[2], 'epoch') ~= ARGV[3] then return 'FENCED' end
local state = redis.call('HGET', KEYS[1], 'state')
if state ~= 'running' then return state == ARGV[6] and 'OK' or 'FENCED' end
end_job(ARGV[1], {unpack(ARGV, 5)})
if ARGV[3] ~= '' then redis.call('HDEL', KEYS[2], 'running_job') end
if ARGV[4] ~= '' then
  redis.call('HSET', KEYS[2], 'seq', ARGV[4])
  redis.call('ZADD', KEYS[3], ARGV[4], ARGV[1])
  redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -4097)
end
return 'OK'
"""
)

CANCEL = (
    _END_JOB
    + """
-- KEYS: job. ARGV: job id, field, value, ... ; one that was handed over has run by half
local state = redis.call('HGET', KEYS[1], 'state')
if state == 'queued' and redis.call('HEXISTS', KEYS[1], 'started_at') == 1 then return 'running' end
if state ~= 'queued' then return state or '' end
end_job(ARGV[1], {unpack(ARGV, 2)})
return 'cancelled'
"""
)

HAND_OVER = """
-- A job leaves its group's queue and waits in another one, still running its second half there.
-- KEYS: job, group, from, to. ARGV: job id, attempt, epoch, new queue, order, field, value, ...
-- After a lost reply the new queue's consumer may have taken it (another attempt) before this is repeated.
if redis.call('HGET', KEYS[1], 'queue') == ARGV[4] then return 'OK' end
if redis.call('HGET', KEYS[1], 'attempt') ~= ARGV[2] then return 'FENCED' end
if redis.call('HGET', KEYS[2], 'epoch') ~= ARGV[3] then return 'FENCED' end
if redis.call('HGET', KEYS[1], 'state') ~= 'running' then return 'FENCED' end
redis.call('HSET', KEYS[1], 'queue', ARGV[4], 'state', 'queued', unpack(ARGV, 6))
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZADD', KEYS[4], ARGV[5], ARGV[1])
redis.call('HDEL', KEYS[2], 'running_job')
return 'OK'
"""

UPDATE_GROUP = """
-- KEYS: group. ARGV: epoch ('' for any), field, value, ... ; an empty value deletes the field
-- A group that is down or destroyed stays so: what its processes still say is not heard.
local state = redis.call('HGET', KEYS[1], 'state')
if not state or state == 'down' or state == 'destroyed' then return 'FENCED' end
if ARGV[1] ~= '' and redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return 'FENCED' end
for i = 2, #ARGV, 2 do
  if ARGV[i + 1] == '' then redis.call('HDEL', KEYS[1], ARGV[i]) else redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
end
return 'OK'
"""

START_EPOCH = """
-- KEYS: group. ARGV: placement, now. Every incarnation of a group has a higher epoch; the old one is fenced off.
local state = redis.call('HGET', KEYS[1], 'state')
if not state or state == 'destroyed' then return -1 end
local epoch = redis.call('HINCRBY', KEYS[1], 'epoch', 1)
redis.call('HSET', KEYS[1], 'state', 'starting', 'placement', ARGV[1], 'heartbeat', ARGV[2])
redis.call('HDEL', KEYS[1], 'cause', 'running_job')
return epoch
"""

END_GROUP = (
    _END_JOB
    + _ROLL_BACK
    + """
-- The group goes down (its first cause stays) or is destroyed, and every job that still waits for it ends: a destroy has what it
-- asks for, the others failed with a cause. Returns the state: one that goes down while a destroy waits is destroyed.
-- KEYS: group, waiting, applied. ARGV: epoch ('' for any), state, cause ('' for none), now, error of the running job,
-- error of queued ones, the seq that is left of its weights ('' for all)
local before = redis.call('HGET', KEYS[1], 'state')
local state = ARGV[2]
if not before or (before == 'destroyed' and state ~= before) then return 'FENCED' end
if ARGV[1] ~= '' and redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return 'FENCED' end
for _, id in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
  local job = redis.call('HMGET', 'nexrl:job:' .. id, 'operation', 'state')
  if job[1] == 'destroy' then
    state = 'destroyed'
    end_job(id, {'state', 'finished', 'finished_at', ARGV[4], 'result', '{}'})
  else
    end_job(id, {'state', 'failed', 'finished_at', ARGV[4], 'error', job[2] == 'running' and ARGV[5] or ARGV[6]})
  end
  redis.call('ZREM', KEYS[2], id)
end
redis.call('HSET', KEYS[1], 'state', state)
if ARGV[3] ~= '' and before ~= state then redis.call('HSET', KEYS[1], 'cause', ARGV[3]) end
if ARGV[7] ~= '' then roll_back(KEYS[1], KEYS[3], ARGV[7]) end
redis.call('HDEL', KEYS[1], 'running_job')
if state == 'destroyed' then
  local identifier = redis.call('HGET', KEYS[1], 'identifier')
  redis.call('SREM', 'nexrl:groups', identifier)
  redis.call('ZADD', 'nexrl:destroyed', 'NX', ARGV[4], identifier)
  redis.call('EXPIRE', 'nexrl:destroyed', RESULT_TTL)
  redis.call('EXPIRE', KEYS[1], RESULT_TTL)
  redis.call('DEL', KEYS[3])
end
return state
"""
)

ROLL_BACK = (
    _ROLL_BACK
    + """
-- Finished jobs whose effect is not in the restored weights say so. KEYS: group, applied. ARGV: epoch, restored seq. Returns how many.
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return -1 end
return roll_back(KEYS[1], KEYS[2], ARGV[2])
"""
)

HOLD_RESULT = """
-- KEYS: delivered. ARGV: job id, now. A result that is not among the delivered is kept anyway.
local since = redis.call('ZSCORE', KEYS[1], ARGV[1])
if since == 'inf' then return 0 end
if since then redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1]) end
return 1
"""

TAKE_DUE = """
-- KEYS: delivered. ARGV: the time that has passed for those that are due
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1])) do redis.call('ZADD', KEYS[1], '+inf', id) end
return redis.call('ZRANGEBYSCORE', KEYS[1], '+inf', '+inf')
"""

DROP_FINISHED = """
-- The oldest jobs, if they ended before a time and nobody holds their result. Returns how many left the index.
-- KEYS: jobs, spent, delivered, forgotten. ARGV: how many to look at, now, that time
local gone = 0
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, ARGV[1] - 1)) do
  local job = redis.call('HMGET', 'nexrl:job:' .. id, 'queue', 'finished_at', 'key', 'result_payload')
  local held = redis.call('ZSCORE', KEYS[3], id)
  local ended = job[2] and tonumber(job[2]) < tonumber(ARGV[3])
  if not job[1] or (ended and (not held or held == 'inf')) then
    redis.call('ZREM', KEYS[1], id)
    gone = gone + 1
    if job[1] then
      redis.call('DEL', 'nexrl:job:' .. id)
      if job[4] then redis.call('ZADD', KEYS[3], '+inf', id) end
      if job[3] and redis.call('DEL', 'nexrl:key:' .. job[3]) == 1 then redis.call('ZADD', KEYS[2], ARGV[2], job[3]) end
      if (redis.call('GET', KEYS[4]) or '') < id then redis.call('SET', KEYS[4], id) end
    end
  end
end
return gone
"""

DROP_DESTROYED = """
-- The records of groups that were destroyed first. KEYS: destroyed. ARGV: how many stay, a time: none goes that ended
-- after it, the time before which they have gone by themselves. Returns how many went.
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', '(' .. ARGV[3])
local excess = math.max(0, redis.call('ZCARD', KEYS[1]) - ARGV[1])
local gone = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. ARGV[2], 'LIMIT', 0, excess)
for _, identifier in ipairs(gone) do
  redis.call('DEL', 'nexrl:group:' .. identifier)
  redis.call('ZREM', KEYS[1], identifier)
end
return #gone
"""
