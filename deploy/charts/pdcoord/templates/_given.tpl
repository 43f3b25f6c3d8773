{{/* What people hand to engines beside what the chart gives them. Each renders nothing. */}}

{{/* Arguments that the chart gives an engine, with the key of the pool or the value that each comes from. */}}
{{- define "pdcoord.vllmArgumentsSet" -}}
{{- $isFp8 := hasPrefix "fp8" (dig "layout" "dtype" "" .pool) -}}
{{- $set := dict
    "--model" "models[].source"
    "--served-model-name" "models[].name"
    "--host" ""
    "--port" ""
    "--block-size" "models[].pools[].layout.block_tokens"
    "--tensor-parallel-size" "models[].pools[].tensorParallel"
    "-tp" "models[].pools[].tensorParallel"
    "--kv-cache-dtype" "models[].pools[].layout.dtype" -}}
{{- if ne .connector "none" -}}{{- $_ := set $set "--kv-transfer-config" "models[].pools[].connector" -}}{{- end -}}
{{- if not $isFp8 -}}{{- $_ := set $set "--dtype" "models[].pools[].layout.dtype" -}}{{- end -}}
{{- if gt (int (default 1 .pool.size)) 1 -}}
  {{- $set = merge $set (dict "--nnodes" "models[].pools[].size" "--node-rank" "" "--master-addr" "" "--headless" "") -}}
{{- end -}}
{{- if dig "limits" "context_tokens_max" 0 .pool -}}
  {{- $_ := set $set "--max-model-len" "models[].pools[].limits.context_tokens_max" -}}
{{- end -}}
{{- if eq (dig "policy" "model" "prefix" "mode" "approximate" .model) "precise" -}}
  {{- $_ := set $set "--kv-events-config" "models[].policy.model.prefix.mode" -}}
{{- end -}}
{{- $set | toJson -}}
{{- end -}}

{{- define "pdcoord.sglangArgumentsSet" -}}
{{- $isFp8 := hasPrefix "fp8" (dig "layout" "dtype" "" .pool) -}}
{{- $set := dict
    "--model-path" "models[].source"
    "--model" "models[].source"
    "--served-model-name" "models[].name"
    "--host" ""
    "--port" ""
    "--page-size" "models[].pools[].layout.block_tokens"
    "--tp-size" "models[].pools[].tensorParallel"
    "--tp" "models[].pools[].tensorParallel"
    "--tensor-parallel-size" "models[].pools[].tensorParallel"
    "--enable-metrics" ""
    "--kv-cache-dtype" "models[].pools[].layout.dtype" -}}
{{- if eq .connector "sglang" -}}
  {{- $set = merge $set (dict "--disaggregation-mode" "models[].pools[].role" "--disaggregation-transfer-backend" "" "--disaggregation-bootstrap-port" "") -}}
{{- end -}}
{{- if not $isFp8 -}}{{- $_ := set $set "--dtype" "models[].pools[].layout.dtype" -}}{{- end -}}
{{- if dig "limits" "context_tokens_max" 0 .pool -}}
  {{- $_ := set $set "--context-length" "models[].pools[].limits.context_tokens_max" -}}
{{- end -}}
{{- if eq (dig "policy" "model" "prefix" "mode" "approximate" .model) "precise" -}}
  {{- $_ := set $set "--kv-events-config" "models[].policy.model.prefix.mode" -}}
{{- end -}}
{{- $set | toJson -}}
{{- end -}}

{{/* Variables of an engine that the chart needs as it sets them; others of its own may be replaced. */}}
{{- define "pdcoord.engineVariablesSet" -}}
{{- $set := dict "POD_IP" "" (ternary "SGLANG_HOST_IP" "VLLM_HOST_IP" (eq .engine "sglang")) "" -}}
{{- if eq .connector "pdcoord" -}}
  {{- $set = merge $set (dict "PYTHONPATH" "" "PDCOORD_KV_KEY_FILE" "auth.existingSecret" "PDCOORD_KV_ADVERTISE_HOST" "") -}}
{{- end -}}
{{- if eq .connector "nixl" -}}
  {{- $set = merge $set (dict "VLLM_NIXL_SIDE_CHANNEL_HOST" "" "VLLM_NIXL_SIDE_CHANNEL_PORT" "") -}}
{{- end -}}
{{- if and (eq .engine "vllm") (dig "layout" "order" "" .pool) -}}
  {{- $_ := set $set "VLLM_KV_CACHE_LAYOUT" "models[].pools[].layout.order" -}}
{{- end -}}
{{- if hasKey .model "huggingFaceToken" -}}{{- $_ := set $set "HF_TOKEN" "models[].huggingFaceToken" -}}{{- end -}}
{{- $set | toJson -}}
{{- end -}}

{{/* {"at", "args", "set", "pool"}: arguments of a pool or of its vendor; vLLM takes _ for - in names, and NAME.KEY. */}}
{{- define "pdcoord.validateEngineArgs" -}}
{{- range $i, $word := .args -}}
  {{- $flag := regexFind "^--?[A-Za-z][A-Za-z0-9_-]*" $word | replace "_" "-" -}}
  {{- if and $flag (hasKey $.set $flag) -}}
    {{- fail (printf "%s[%d] is %q, which the chart gives the engine of %s itself: %s" $.at $i $word $.pool (include "pdcoord.instead" (index $.set $flag))) -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{- define "pdcoord.validateEngineEnv" -}}
{{- range $name, $value := .env -}}
  {{- if hasKey $.set $name -}}
    {{- fail (printf "%s.%s is %q, but the chart sets it for the engine of %s: %s" $.at $name $value $.pool (include "pdcoord.instead" (index $.set $name))) -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{- define "pdcoord.validateEngines" -}}
{{- $v := .Values -}}
{{- range $m, $model := $v.models -}}
  {{- range $p, $pool := $model.pools -}}
    {{- if not (hasKey $pool "existing") -}}
      {{- $at := printf "models[%d].pools[%d]" $m $p -}}
      {{- $engine := default "vllm" $pool.engine -}}
      {{- $connector := default (ternary (ternary "sglang" "none" (ne $pool.role "both")) $v.pd.connector (eq $engine "sglang")) $pool.connector -}}
      {{- $vendor := index $v.vendors $pool.vendor -}}
      {{- $given := dict "model" $model "pool" $pool "engine" $engine "connector" (ternary $connector "none" $v.pd.enabled) -}}
      {{- $set := include (printf "pdcoord.%sArgumentsSet" $engine) $given | fromJson -}}
      {{- if not $pool.command -}}
        {{- include "pdcoord.validateEngineArgs" (dict "at" (printf "%s.args" $at) "args" $pool.args "set" $set "pool" $at) -}}
        {{- if eq $engine "vllm" -}}
          {{- include "pdcoord.validateEngineArgs" (dict "at" (printf "vendors.%s.args" $pool.vendor) "args" $vendor.args "set" $set "pool" $at) -}}
        {{- end -}}
      {{- end -}}
      {{- $set = include "pdcoord.engineVariablesSet" $given | fromJson -}}
      {{- include "pdcoord.validateEngineEnv" (dict "at" (printf "%s.env" $at) "env" $pool.env "set" $set "pool" $at) -}}
      {{- range $key := list "env" "tcpEnv" "rdmaEnv" -}}
        {{- include "pdcoord.validateEngineEnv" (dict "at" (printf "vendors.%s.%s" $pool.vendor $key) "env" (index $vendor $key) "set" $set "pool" $at) -}}
      {{- end -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{/*
{"root", "config"}: has Envoy wait for the picker's answer as long as calls may wait there, where that is more than its
file says: a model's longest wait, the body before it, and 10 s. Changes the configuration and renders nothing.
*/}}
{{- define "pdcoord.envoyTimes" -}}
{{- $wait := 30000.0 -}}
{{- range .root.Values.models -}}
  {{- $wait = maxf $wait (float64 (dig "policy" "admission" "wait_ms_max" 30000 .)) -}}
{{- end -}}
{{- $body := 60.0 -}}
{{- range $name, $value := .root.Values.coordinator.env -}}
  {{- if eq (upper $name) "PDCOORD_BODY_TIMEOUT_S" -}}{{- $body = float64 $value -}}{{- end -}}
{{- end -}}
{{- $needed := addf (divf $wait 1000.0) $body 10.0 | ceil | int -}}
{{- range $listener := .config.static_resources.listeners -}}{{- range $chain := $listener.filter_chains -}}{{- range $network := $chain.filters -}}
  {{- $manager := $network.typed_config -}}
  {{- range $filter := $manager.http_filters -}}
    {{- if hasKey $filter.typed_config "message_timeout" -}}
      {{- $own := trimSuffix "s" $filter.typed_config.message_timeout | int -}}
      {{- $_ := set $filter.typed_config "message_timeout" (printf "%ds" (max $own $needed)) -}}
    {{- end -}}
  {{- end -}}
  {{- $own := trimSuffix "s" $manager.stream_idle_timeout | int -}}
  {{- $_ := set $manager "stream_idle_timeout" (printf "%ds" (max $own (add $needed 60))) -}}
{{- end -}}{{- end -}}{{- end -}}
{{- end -}}
