{{/*
What the processes would refuse, or take and ignore: flags, variables and settings that people hand through.
tests/chart/test_refusals.py holds the lists against the processes' own. Each renders nothing.
*/}}

{{/* Flags of pdcoord-sidecar that are the chart's, with the value that each comes from. */}}
{{- define "pdcoord.sidecarFlagsSet" -}}
{{- dict
    "--port" "models[].pools[].existing.sidecarPort"
    "--engine" "models[].pools[].existing.port"
    "--dialect" "models[].pools[].connector"
    "--metrics-host" ""
    "--metrics-port" ""
    "--control" ""
    "--control-key-file" "auth.existingSecret"
    "--control-ca-file" "auth.controlTls.secretName"
    "--control-cert-file" "auth.controlTls.secretName"
    "--control-cert-key-file" "auth.controlTls.secretName"
    "--allow-from-control" ""
    "--tls-cert-file" "auth.internalTls.secretName"
    "--tls-key-file" "auth.internalTls.secretName"
    "--tls-client-ca-file" "auth.internalTls.secretName"
    "--upstream-ca-file" "auth.internalTls.secretName"
    "--upstream-cert-file" "auth.internalTls.secretName"
    "--upstream-cert-key-file" "auth.internalTls.secretName"
    "--upstream-tls-name" "auth.internalTls.serverName"
    "--plan-keys-file" "auth.planKeysSecret"
    "--kv-agent" "models[].pools[].connector"
    "--transfer-deadline-ms" "pd.leaseSeconds"
    "--drain-s" "sidecar.drainSeconds"
    "--log-level" "sidecar.logLevel"
  | toJson -}}
{{- end -}}

{{- define "pdcoord.sidecarFlagsFree" -}}
{{- list "--host" "--allow" "--allow-file" "--stream-idle-ms" "--answer-ms" "--prefill-deadline-ms" "--fallback-colocated" "--bootstrap-port" "--kv-port" "--kv-key-file" "--probe-interval-s" "--body-bytes-max" "--bodies-bytes-max" "--live-max" "--resume-bytes-max" "--control-address" | toJson -}}
{{- end -}}

{{- define "pdcoord.extprocFlagsSet" -}}
{{- dict
    "--grpc-port" ""
    "--grpc-health-port" ""
    "--metrics-port" ""
    "--secure-serving" "gateway.extproc.secureServing"
    "--no-secure-serving" "gateway.extproc.secureServing"
    "--policy" "models[].policy"
    "--endpoints" "models[].pools"
    "--pool-name" "adopt.podSelector"
    "--pool-namespace" ""
    "--log-level" "coordinator.logLevel"
    "--drain-s" "coordinator.drainSeconds"
  | toJson -}}
{{- end -}}

{{- define "pdcoord.extprocFlagsFree" -}}
{{- list "--host" "--admin-host" "--admin-port" "--fallbacks-max" "--conformance" "--no-conformance" "--pass-paths" | toJson -}}
{{- end -}}

{{/* Variables of the coordinator that are the chart's, with the value that each comes from. */}}
{{- define "pdcoord.variablesSet" -}}
{{- $set := dict
    "PDCOORD_POLICY" "models[].policy"
    "PDCOORD_ENDPOINTS" "models[].pools"
    "PDCOORD_KUBERNETES_POLICIES" "policy.source"
    "PDCOORD_KUBERNETES_PODS" ""
    "PDCOORD_KUBERNETES_NAMESPACE" ""
    "PDCOORD_KUBERNETES_SELECTOR" "adopt.podSelector"
    "PDCOORD_INFERENCE_POOL" "adopt.podSelector"
    "PDCOORD_CONTROL_HOST" ""
    "PDCOORD_CONTROL_PORT" ""
    "PDCOORD_CONTROL_KEY_FILE" "auth.existingSecret"
    "PDCOORD_CONTROL_CERT_FILE" "auth.controlTls.secretName"
    "PDCOORD_CONTROL_CERT_KEY_FILE" "auth.controlTls.secretName"
    "PDCOORD_CONTROL_CA_FILE" "auth.controlTls.secretName"
    "PDCOORD_KEYS_FILE" "auth.keysSecret"
    "PDCOORD_PLAN_KEYS_FILE" "auth.planKeysSecret"
    "PDCOORD_ADMIN_TLS_CERT_FILE" "auth.internalTls.secretName"
    "PDCOORD_ADMIN_TLS_KEY_FILE" "auth.internalTls.secretName"
    "PDCOORD_UPSTREAM_CA_FILE" "auth.internalTls.secretName"
    "PDCOORD_UPSTREAM_CERT_FILE" "auth.internalTls.secretName"
    "PDCOORD_UPSTREAM_CERT_KEY_FILE" "auth.internalTls.secretName"
    "PDCOORD_UPSTREAM_TLS_NAME" "auth.internalTls.serverName"
    "PDCOORD_ADMIN_KEY_FILE" "auth.adminKeySecret"
    "PDCOORD_ENGINE_KEY_FILE" "auth.engineKeySecret"
    "PDCOORD_REPLICA" ""
    "PDCOORD_LOG_LEVEL" "coordinator.logLevel"
    "PDCOORD_DRAIN_NOTICE_S" "coordinator.drainNoticeSeconds"
    "PDCOORD_DRAIN_S" "coordinator.drainSeconds" -}}
{{- if eq (include "pdcoord.isExtproc" .) "true" -}}
  {{- $set = merge $set (dict "PDCOORD_GRPC_PORT" "" "PDCOORD_GRPC_HEALTH_PORT" "" "PDCOORD_METRICS_PORT" "" "PDCOORD_SECURE_SERVING" "gateway.extproc.secureServing" "PDCOORD_GRPC_CLIENT_CA_FILE" "auth.internalTls.secretName" "PDCOORD_TLS_CERT_FILE" "auth.internalTls.secretName" "PDCOORD_TLS_KEY_FILE" "auth.internalTls.secretName") -}}
{{- else -}}
  {{- $set = merge $set (dict "PDCOORD_HOST" "" "PDCOORD_PORT" "gateway.service.port" "PDCOORD_TLS_CERT_FILE" "gateway.tls.secretName" "PDCOORD_TLS_KEY_FILE" "gateway.tls.secretName") -}}
{{- end -}}
{{- $set | toJson -}}
{{- end -}}

{{- define "pdcoord.variablesFree" -}}
{{- $free := list "PDCOORD_ADMIN_HOST" "PDCOORD_ADMIN_PORT" "PDCOORD_CONNECT_TIMEOUT_S" "PDCOORD_SCRAPE_INTERVAL_S" "PDCOORD_SCRAPE_DEADLINE_S" "PDCOORD_SCRAPE_BACKOFF_S_MAX" "PDCOORD_SCRAPE_CONCURRENT_MAX" "PDCOORD_PATHS_INTERVAL_S" "PDCOORD_TOKENIZER_THREADS" "PDCOORD_TOKENIZER_CACHE_BYTES_MAX" "PDCOORD_RELOAD_INTERVAL_S" "PDCOORD_DECISIONS_MAX" "PDCOORD_BODY_BYTES_MAX" "PDCOORD_BODIES_BYTES_MAX" "PDCOORD_BODY_TIMEOUT_S" "PDCOORD_REQUEST_DEADLINE_S" -}}
{{- if eq (include "pdcoord.isExtproc" .) "true" -}}
  {{- $free = concat $free (list "PDCOORD_HOST" "PDCOORD_FALLBACKS_MAX" "PDCOORD_CONFORMANCE" "PDCOORD_PASS_PATHS" "PDCOORD_STREAMS_MAX") -}}
{{- else -}}
  {{- $free = concat $free (list "PDCOORD_HEAD_TIMEOUT_S" "PDCOORD_ANSWER_TIMEOUT_S" "PDCOORD_STREAM_IDLE_S" "PDCOORD_RESUME_BYTES_MAX") -}}
{{- end -}}
{{- $free | toJson -}}
{{- end -}}

{{- define "pdcoord.agentSettingsSet" -}}
{{- dict
    "backends" "transfer.backends"
    "staging_bytes" "pd.stagingBytes"
    "lease_s" "pd.leaseSeconds"
    "key_file" "auth.existingSecret"
    "advertise_host" ""
    "port" ""
  | toJson -}}
{{- end -}}

{{- define "pdcoord.agentSettingsFree" -}}
{{- list "listen_host" "backend_options" "transports" "staging_device" "pattern_bytes" "repack_threads" "chunk_tokens_max" "head_runs" "transfer_timeout_s" "prefill_timeout_s" "heartbeat_s" "handshake_timeout_s" "backoff_first_s" "backoff_max_s" "connections_max" "peers_max" "out_bytes_max" "transfers_max" "tcp_port" "tcp_lanes" | toJson -}}
{{- end -}}

{{/* What to do in place of setting what the chart sets. */}}
{{- define "pdcoord.instead" -}}
{{- if . -}}set {{ . }}{{- else -}}leave it out{{- end -}}
{{- end -}}

{{/* {"at", "args", "process", "set", "free", "switches"}: flags that a process takes from a person. */}}
{{- define "pdcoord.validateFlags" -}}
{{- $waits := "" -}}
{{- range $i, $word := .args -}}
  {{- $here := printf "%s[%d] is %q" $.at $i $word -}}
  {{- $flag := first (splitList "=" $word) -}}
  {{- if and (eq $.process "pdcoord extproc") (regexMatch "^-[A-Za-z]" $flag) -}}{{- $flag = printf "-%s" $flag -}}{{- end -}}
  {{- if hasPrefix "-" $word -}}
    {{- if $waits -}}{{- fail (printf "%s, where the value of %s belongs: give %s=VALUE" $here $waits $waits) -}}{{- end -}}
    {{- if hasKey $.set $flag -}}
      {{- fail (printf "%s, which the chart gives the process itself: %s" $here (include "pdcoord.instead" (index $.set $flag))) -}}
    {{- end -}}
    {{- if not (has $flag $.free) -}}
      {{- fail (printf "%s, which %s does not take here: give some of %s, or leave it out" $here $.process (join ", " $.free)) -}}
    {{- end -}}
    {{- if not (or (contains "=" $word) (has $flag $.switches)) -}}{{- $waits = $flag -}}{{- end -}}
  {{- else if $waits -}}
    {{- $waits = "" -}}
  {{- else -}}
    {{- fail (printf "%s, which is neither a flag nor the value of one: give --FLAG=VALUE" $here) -}}
  {{- end -}}
{{- end -}}
{{- if $waits -}}
  {{- fail (printf "%s ends with %s, which needs a value: give %s=VALUE" .at $waits $waits) -}}
{{- end -}}
{{- end -}}

{{- define "pdcoord.validateArguments" -}}
{{- $v := .Values -}}
{{- $set := include "pdcoord.sidecarFlagsSet" . | fromJson -}}
{{- $ours := false -}}
{{- range $v.models -}}{{- range .pools -}}
  {{- $connector := default (ternary "" $v.pd.connector (eq .engine "sglang")) .connector -}}
  {{- if and (eq $connector "pdcoord") (ne .role "prefill") (not (hasKey . "existing")) -}}{{- $ours = true -}}{{- end -}}
{{- end -}}{{- end -}}
{{- if and $v.pd.enabled $ours -}}{{- $_ := set $set "--kv-key-file" "auth.existingSecret" -}}{{- end -}}
{{- range $i, $word := $v.sidecar.args -}}
  {{- if eq (first (splitList "=" $word)) "--allow-any" -}}
    {{- fail (printf "sidecar.args[%d] is %q: coordinators name the targets (--allow-from-control), and with connector pdcoord the sidecar would not start; leave it out, or name further targets by --allow" $i $word) -}}
  {{- end -}}
{{- end -}}
{{- $free := include "pdcoord.sidecarFlagsFree" . | fromJsonArray -}}
{{- include "pdcoord.validateFlags" (dict "at" "sidecar.args" "args" $v.sidecar.args "process" "pdcoord-sidecar" "set" $set "free" $free "switches" list) -}}
{{- $args := $v.gateway.extproc.args -}}
{{- if and $args (eq $v.gateway.mode "embedded") -}}
  {{- fail (printf "gateway.extproc.args is %s but gateway.mode is embedded, which has no such process: use coordinator.env, or leave it out" (toJson $args)) -}}
{{- end -}}
{{- range $i, $word := $args -}}
  {{- if regexMatch "^--?cert-path(=|$)" $word -}}
    {{- fail (printf "gateway.extproc.args[%d] is %q, but no volume of the pod has a certificate: leave it out, and the process makes one; with gateway.mode envoy set auth.internalTls.secretName" $i $word) -}}
  {{- end -}}
{{- end -}}
{{- $set = include "pdcoord.extprocFlagsSet" . | fromJson -}}
{{- $free = include "pdcoord.extprocFlagsFree" . | fromJsonArray -}}
{{- include "pdcoord.validateFlags" (dict "at" "gateway.extproc.args" "args" $args "process" "pdcoord extproc" "set" $set "free" $free "switches" (list "--conformance" "--no-conformance")) -}}
{{- end -}}

{{- define "pdcoord.validateVariables" -}}
{{- $set := include "pdcoord.variablesSet" . | fromJson -}}
{{- $free := include "pdcoord.variablesFree" . | fromJsonArray -}}
{{- range $name, $value := .Values.coordinator.env -}}
  {{- $here := printf "coordinator.env.%s is %q" $name $value -}}
  {{- if hasKey $set (upper $name) -}}
    {{- fail (printf "%s, but the chart sets it: %s" $here (include "pdcoord.instead" (index $set (upper $name)))) -}}
  {{- end -}}
  {{- if eq (upper $name) "PDCOORD_CERT_PATH" -}}
    {{- fail (printf "%s, but no volume of the pod has a certificate: leave it out, and the process makes one; with gateway.mode envoy set auth.internalTls.secretName" $here) -}}
  {{- end -}}
  {{- if regexMatch "^PDCOORD_(ADMIN_)?TLS_CLIENT_" (upper $name) -}}
    {{- fail (printf "%s, but no volume of the pod has a certificate for that: leave it out, and have clients known by auth.keysSecret and auth.adminKeySecret" $here) -}}
  {{- end -}}
  {{- if and (hasPrefix "PDCOORD_" (upper $name)) (not (has (upper $name) $free)) -}}
    {{- fail (printf "%s, which no setting is named like with gateway.mode %s: give some of %s, or leave it out" $here $.Values.gateway.mode ($free | sortAlpha | join ", ")) -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{- define "pdcoord.validateTransfer" -}}
{{- $v := .Values -}}{{- $given := $v.transfer.settings -}}
{{- $set := include "pdcoord.agentSettingsSet" . | fromJson -}}
{{- $free := include "pdcoord.agentSettingsFree" . | fromJsonArray -}}
{{- range $name, $value := $given -}}
  {{- $here := printf "transfer.settings.%s is %s" $name (toJson $value) -}}
  {{- if hasKey $set $name -}}
    {{- fail (printf "%s, but the chart sets it: %s" $here (include "pdcoord.instead" (index $set $name))) -}}
  {{- end -}}
  {{- if not (has $name $free) -}}
    {{- fail (printf "%s, which is no setting of the agent: give some of %s, or leave it out" $here ($free | sortAlpha | join ", ")) -}}
  {{- end -}}
{{- end -}}
{{- $timeout := float64 (dig "transfer_timeout_s" 5.0 $given) -}}
{{- if ge $timeout (float64 $v.pd.leaseSeconds) -}}
  {{- fail (printf "transfer.settings.transfer_timeout_s is %g, not below pd.leaseSeconds (%d): KV would be gone while it is waited for; give less" $timeout (int $v.pd.leaseSeconds)) -}}
{{- end -}}
{{- $first := float64 (dig "backoff_first_s" 0.1 $given) -}}{{- $most := float64 (dig "backoff_max_s" 5.0 $given) -}}
{{- if gt $first $most -}}
  {{- fail (printf "transfer.settings.backoff_first_s is %g, above transfer.settings.backoff_max_s (%g): give at most that" $first $most) -}}
{{- end -}}
{{- end -}}

{{/* Who would be let in by nobody's leave. */}}
{{- define "pdcoord.validateAccess" -}}
{{- $v := .Values -}}
{{- if and $v.auth.keysSecret (ne $v.gateway.mode "embedded") (eq $v.gateway.extproc.failureMode "FailOpen") -}}
  {{- fail (printf "gateway.extproc.failureMode is FailOpen with auth.keysSecret %q: without a coordinator the Gateway would let in calls without a key; set FailClose" $v.auth.keysSecret) -}}
{{- end -}}
{{- if and $v.gateway.tls.secretName (ne $v.gateway.mode "embedded") -}}
  {{- fail (printf "gateway.tls.secretName is %q but gateway.mode is %s, where the coordinator has no front door: give the certificate to the Gateway, or leave it out" $v.gateway.tls.secretName $v.gateway.mode) -}}
{{- end -}}
{{- with and (not $v.auth.adminKeySecret) (include "pdcoord.adminOpen" .) -}}
  {{- fail (printf "%s, where anybody may ask the admin listener, and the process would not start: set auth.adminKeySecret" .) -}}
{{- end -}}
{{- end -}}

{{- define "pdcoord.validateReach" -}}
{{- $n := .Values.networkPolicy -}}{{- $mode := .Values.monitoring.mode -}}
{{- if and $n.enabled $n.clientsFrom (not $n.metricsFrom) (ne $mode "none") (eq .Values.gateway.mode "embedded") -}}
  {{- fail (printf "networkPolicy.metricsFrom is empty with networkPolicy.clientsFrom set and monitoring.mode %s: with gateway.mode embedded /metrics is on the port of requests, so Prometheus would be cut off; name its peers in networkPolicy.metricsFrom" $mode) -}}
{{- end -}}
{{- end -}}

{{/*
Which pools of a model can split a request: one that prefills and one that decodes, of one connector. Takes
{"root", "model", "at", "slug"}; renders "true" where some can. Layouts are judged while running.
*/}}
{{- define "pdcoord.validatePairs" -}}
{{- $v := .root.Values -}}{{- $at := .at -}}{{- $slug := .slug -}}
{{- $sides := list -}}{{- $isConnected := false -}}{{- $canSplit := false -}}
{{- range $p, $pool := .model.pools -}}
  {{- $connector := default (ternary (ternary "sglang" "none" (ne $pool.role "both")) $v.pd.connector (eq (default "vllm" $pool.engine) "sglang")) $pool.connector -}}
  {{- if ne $connector "none" -}}{{- $isConnected = true -}}{{- end -}}
  {{- $sides = append $sides (dict "at" (printf "%s.pools[%d]" $at $p) "role" $pool.role "connector" $connector) -}}
{{- end -}}
{{- range $side := $sides -}}
  {{- $hasPartner := false -}}{{- $others := list -}}
  {{- $wanted := ternary "prefill" "decode" (eq $side.role "decode") -}}
  {{- range $other := $sides -}}
    {{- if has $other.role (list $wanted "both") -}}
      {{- $others = append $others (printf "%s: %s" $other.at $other.connector) -}}
      {{- if and (eq $other.connector $side.connector) (ne $side.connector "none") -}}{{- $hasPartner = true -}}{{- end -}}
    {{- end -}}
  {{- end -}}
  {{- if $hasPartner -}}{{- $canSplit = true -}}
  {{- else if or (eq $side.role "prefill") (eq $side.connector "sglang") -}}
    {{- fail (printf "%s.connector is %q with role %s, and no pool of %s (%s) that %ss has it (%s), so this one would never serve: give both one connector, or this one role both and connector none" $side.at $side.connector $side.role $at $slug $wanted (default "there is none" (join ", " $others))) -}}
  {{- end -}}
{{- end -}}
{{- if and $isConnected (not $canSplit) -}}
  {{- $shown := list -}}
  {{- range $sides -}}{{- $shown = append $shown (printf "%s: %s, %s" .at .role .connector) -}}{{- end -}}
  {{- fail (printf "pd.enabled is true but no two pools of %s (%s) that prefill and decode have one connector (%s): give them one, or connector none to all of them" $at $slug (join "; " $shown)) -}}
{{- end -}}
{{- if $canSplit -}}true{{- end -}}
{{- end -}}
