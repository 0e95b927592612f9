-- Ends a queued job. Returns 'cancelled', or the state in which it is past that.
-- args: job_id, fields (name, value, ...)
local job = unpack(KEYS)
local state, started = unpack(redis.call('HMGET', job, 'state', 'started_at'))
if state == 'queued' and started then return 'running' end -- handed over: its first half has run
if state ~= 'queued' then return state or '' end
end_job(args.job_id, args.fields)
return 'cancelled'
