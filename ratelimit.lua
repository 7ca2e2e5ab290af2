-- ratelimit.lua counts events in fixed windows. Each command is atomic and takes one round trip.
--
-- KEYS are the counters, all in one slot of a Redis Cluster. ARGV[1] is the name of the command,
-- ARGV[2] is the length of a window in seconds, and then follows one number for each counter.
--
-- ratelimit.go puts the line "#!lua flags=allow-oom" before this text, so that the script runs
-- even if the memory of Redis is full. Otherwise nobody could log out to free some of it.

local window_ms = ARGV[2] * 1000

-- argument returns the number in ARGV that belongs to KEYS[i].
local function argument(i)
  return tonumber(ARGV[2 + i])
end

-- count returns how many events a counter has in its window.
local function count(key)
  return tonumber(redis.call('GET', key) or 0)
end

-- ensure_window returns how many milliseconds are left of a counter's window, at least 1. If the
-- counter has no TTL, it opens a window. That is so after the first event, and also if a TTL has
-- been lost, which would otherwise close an account for ever.
local function ensure_window(key)
  local ms = redis.call('PTTL', key)
  if ms < 0 then
    ms = window_ms
    redis.call('PEXPIRE', key, ms)
  end
  return math.max(ms, 1)
end

local command = {}

-- take counts one event on each counter, unless one of them has reached its maximum, which is its
-- number in ARGV. Then it counts on none. It returns two numbers: how many more events are
-- allowed, or -1 if this one is not; and how many milliseconds are left of the window.
function command.take()
  local left, wait_ms = math.huge, 0
  for i, key in ipairs(KEYS) do
    if count(key) >= argument(i) then
      left = -1
      wait_ms = math.max(wait_ms, ensure_window(key))
    end
  end
  if left == -1 then
    return {left, wait_ms}
  end

  for i, key in ipairs(KEYS) do
    local remaining = argument(i) - redis.call('INCR', key)
    local ms = ensure_window(key)
    if remaining < left then
      left, wait_ms = remaining, ms
    end
  end
  return {left, wait_ms}
end

-- give_back takes events off each counter, as many as its number in ARGV. No counter falls below
-- zero. If the window has ended since, it takes them off the next window, which allows one event
-- more there.
function command.give_back()
  for i, key in ipairs(KEYS) do
    if count(key) > argument(i) then
      redis.call('DECRBY', key, argument(i))
    else
      redis.call('DEL', key)
    end
  end
end

-- A command that returns nothing is answered with OK.
return command[ARGV[1]]() or redis.status_reply('OK')
