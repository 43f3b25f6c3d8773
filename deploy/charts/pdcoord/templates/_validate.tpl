{{/*
Contradictions between values that the schema cannot see. Each failure names the full path of the value, the
value, and what to give instead. Renders nothing.
*/}}
{{- define "pdcoord.validate" -}}
{{- $v := .Values -}}
{{- if not $v.models -}}
  {{- fail "models is empty: name at least one model with its pools, as in docs/chart.md" -}}
{{- end -}}
{{- include "pdcoord.validateFullname" . -}}
{{- include "pdcoord.validateCoordinator" . -}}
{{- include "pdcoord.validateGateway" . -}}
{{- $names := dict -}}{{- $slugs := dict -}}{{- $served := dict -}}{{- $splits := list -}}
{{- range $m, $model := $v.models -}}
  {{- $at := printf "models[%d]" $m -}}
  {{- $slug := include "pdcoord.slug" $model -}}
  {{- if not (regexMatch "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$" $slug) -}}
    {{- fail (printf "%s.name is %q, which makes no object name (%q): set %s.id to lower-case letters, digits and dashes" $at $model.name $slug $at) -}}
  {{- end -}}
  {{- if hasKey $slugs $slug -}}
    {{- fail (printf "%s.id is %q, as of %s: set %s.id to another name" $at $slug (index $slugs $slug) $at) -}}
  {{- end -}}
  {{- $_ := set $slugs $slug $at -}}
  {{- $uses := list (dict "where" (printf "%s.name" $at) "name" $model.name) -}}
  {{- range $kind := list "aliases" "adapters" -}}
    {{- range $i, $name := default list (index $model $kind) -}}
      {{- $uses = append $uses (dict "where" (printf "%s.%s[%d]" $at $kind $i) "name" $name) -}}
    {{- end -}}
  {{- end -}}
  {{- range $use := $uses -}}
    {{- if hasKey $served $use.name -}}
      {{- fail (printf "%s is %q, which %s is too: one name leads to one model" $use.where $use.name (index $served $use.name)) -}}
    {{- end -}}
    {{- $_ := set $served $use.name $use.where -}}
  {{- end -}}
  {{- range $p, $pool := $model.pools -}}
    {{- $where := printf "%s.pools[%d]" $at $p -}}
    {{- if hasKey $names $pool.name -}}
      {{- fail (printf "%s.name is %q, which %s has too: pool names are unique over all models" $where $pool.name (index $names $pool.name)) -}}
    {{- end -}}
    {{- $_ := set $names $pool.name $where -}}
    {{- include "pdcoord.validatePoolName" (dict "pool" $pool "at" $where) -}}
    {{- include "pdcoord.validatePool" (dict "root" $ "model" $model "pool" $pool "at" $where) -}}
    {{- if eq (default "vllm" $pool.engine) "sglang" -}}
      {{- range $i, $name := default list $model.adapters -}}
        {{- if or (not (hasPrefix (printf "%s:" $model.name) $name)) (hasSuffix ":" $name) -}}
          {{- fail (printf "%s.adapters[%d] is %q; name it \"%s:<name>\": so SGLang (%s) knows an adapter, and without the colon answers as its base model; vLLM takes such a name as well" $at $i $name $model.name $where) -}}
        {{- end -}}
      {{- end -}}
    {{- end -}}
  {{- end -}}
  {{- $splits = append $splits (include "pdcoord.validateRoles" (dict "root" $ "model" $model "at" $at "slug" $slug)) -}}
{{- end -}}
{{- if and .Values.pd.enabled (not (has "true" $splits)) -}}
  {{- fail "pd.enabled is true but every pool of every model has connector none: nothing could be split; leave connector out of pools that prefill and decode, or set pd.enabled: false" -}}
{{- end -}}
{{- include "pdcoord.validateAdoption" . -}}
{{- include "pdcoord.validateSelectors" . -}}
{{- include "pdcoord.validateEngines" . -}}
{{- include "pdcoord.validateScaling" . -}}
{{- include "pdcoord.validateArguments" . -}}
{{- include "pdcoord.validateVariables" . -}}
{{- include "pdcoord.validateTransfer" . -}}
{{- include "pdcoord.validateReach" . -}}
{{- include "pdcoord.validateAccess" . -}}
{{- include "pdcoord.validateTls" . -}}
{{- end -}}

{{- define "pdcoord.validateCoordinator" -}}
{{- $c := .Values.coordinator -}}
{{- if and (eq (int $c.replicas) 0) $c.podDisruptionBudget.enabled -}}
  {{- fail "coordinator.replicas is 0 with coordinator.podDisruptionBudget.enabled true: nothing would serve; give at least 1" -}}
{{- end -}}
{{- $sum := add (int $c.drainNoticeSeconds) (int $c.drainSeconds) -}}
{{- if lt (int (include "pdcoord.terminationGrace" .)) (int $sum) -}}
  {{- fail (printf "coordinator.terminationGracePeriodSeconds is %d, below coordinator.drainNoticeSeconds + coordinator.drainSeconds (%d): calls under way would be cut; give at least %d" (int $c.terminationGracePeriodSeconds) $sum $sum) -}}
{{- end -}}
{{- if and (not .Values.serviceAccount.create) (not .Values.serviceAccount.name) -}}
  {{- fail "serviceAccount.create is false and serviceAccount.name is empty: name an account bound to the Role of docs/kubernetes.md" -}}
{{- end -}}
{{- end -}}

{{- define "pdcoord.validateGateway" -}}
{{- $g := .Values.gateway -}}
{{- if and (eq $g.mode "attach") (not $g.attach.gateway.name) -}}
  {{- fail "gateway.mode is attach but gateway.attach.gateway.name is empty: name the Gateway that requests come in by" -}}
{{- end -}}
{{- if and (ne $g.mode "attach") $g.attach.gateway.name -}}
  {{- fail (printf "gateway.attach.gateway.name is %q but gateway.mode is %s: set gateway.mode to attach, or leave the name out" $g.attach.gateway.name $g.mode) -}}
{{- end -}}
{{- if eq $g.mode "attach" -}}
  {{- $first := 0 -}}{{- $at := "" -}}
  {{- range $m, $model := .Values.models -}}
    {{- range $p, $pool := $model.pools -}}
      {{- if or (not $.Values.pd.enabled) (ne $pool.role "prefill") -}}
        {{- $port := 8000 -}}
        {{- if hasKey $pool "existing" -}}
          {{- $port = int (ternary (default 8001 $pool.existing.sidecarPort) (default 8000 $pool.existing.port) $.Values.pd.enabled) -}}
        {{- end -}}
        {{- $here := printf "models[%d].pools[%d]" $m $p -}}
        {{- if not $first -}}{{- $first = $port -}}{{- $at = $here -}}{{- end -}}
        {{- if ne $first $port -}}
          {{- fail (printf "%s takes requests at port %d, %s at %d, and gateway.mode is attach: an InferencePool asks every pod at each port, so give all the same by existing.port or existing.sidecarPort" $here $port $at $first) -}}
        {{- end -}}
      {{- end -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- if and $g.attach.destinationRule.enabled (not (and (eq $g.mode "attach") $g.extproc.secureServing)) -}}
  {{- fail "gateway.attach.destinationRule.enabled is true: it needs gateway.mode attach and gateway.extproc.secureServing true; leave it out otherwise" -}}
{{- end -}}
{{- if and (eq $g.mode "envoy") (eq $g.extproc.failureMode "FailOpen") -}}
  {{- fail "gateway.extproc.failureMode is FailOpen with gateway.mode envoy: that Envoy knows no server but those the coordinator names; set FailClose" -}}
{{- end -}}
{{- end -}}

{{- define "pdcoord.validatePool" -}}
{{- $v := .root.Values -}}{{- $pool := .pool -}}{{- $at := .at -}}
{{- if not (hasKey $v.vendors $pool.vendor) -}}
  {{- fail (printf "%s.vendor is %q, expected one of %s, or a new entry of vendors" $at $pool.vendor (keys $v.vendors | sortAlpha | join ", ")) -}}
{{- end -}}
{{- $vendor := index $v.vendors $pool.vendor -}}
{{- $engine := default "vllm" $pool.engine -}}
{{- $object := printf "%s-%s" (include "pdcoord.fullname" .root) $pool.name -}}
{{- if gt (len $object) 52 -}}
  {{- fail (printf "%s.name is %q, which makes the object name %q of %d characters: at most 52 leave room for what Kubernetes appends; shorten it or set fullnameOverride" $at $pool.name $object (len $object)) -}}
{{- end -}}
{{- $connector := default (ternary (ternary "sglang" "none" (ne $pool.role "both")) $v.pd.connector (eq $engine "sglang")) $pool.connector -}}
{{- if and (eq $engine "sglang") (has $connector (list "nixl" "pdcoord")) -}}
  {{- fail (printf "%s.connector is %q with engine sglang, which has its own: set sglang or none" $at $connector) -}}
{{- end -}}
{{- if and (eq $engine "vllm") (eq $connector "sglang") -}}
  {{- fail (printf "%s.connector is \"sglang\" with engine vllm: set pdcoord, nixl or none" $at) -}}
{{- end -}}
{{- if and (eq $engine "sglang") (eq $pool.role "both") (eq $connector "sglang") -}}
  {{- fail (printf "%s.role is \"both\" with connector sglang: an SGLang server prefills or decodes; set role prefill or decode, or connector none" $at) -}}
{{- end -}}
{{- if $v.pd.enabled -}}
  {{- if and (ne $pool.role "both") (eq $connector "none") -}}
    {{- fail (printf "%s.connector is \"none\" with role %s: its KV could not move; set a connector, or role both" $at $pool.role) -}}
  {{- end -}}
  {{- if and (ne $connector "none") (not $pool.linkGbitPerSecond) -}}
    {{- fail (printf "%s.linkGbitPerSecond is not set: without it no path has a bandwidth and nothing is split; give what the pods' network card carries" $at) -}}
  {{- end -}}
  {{- if and (eq $connector "pdcoord") (not (hasKey $pool "existing")) (not $v.transfer.image.repository) -}}
    {{- fail (printf "%s.connector is \"pdcoord\" but transfer.image.repository is empty: the connector comes with that image; name it, or set connector nixl" $at) -}}
  {{- end -}}
  {{- $lease := int $v.pd.leaseSeconds -}}
  {{- if and (hasKey $pool "terminationGracePeriodSeconds") (ne $pool.role "decode") (lt (int $pool.terminationGracePeriodSeconds) $lease) -}}
    {{- fail (printf "%s.terminationGracePeriodSeconds is %d, below pd.leaseSeconds (%d): KV that is waited for would go away with the pod; give at least %d" $at (int $pool.terminationGracePeriodSeconds) $lease $lease) -}}
  {{- end -}}
  {{- $drain := int $v.sidecar.drainSeconds -}}
  {{- if and (hasKey $pool "terminationGracePeriodSeconds") (ne $pool.role "prefill") (lt (int $pool.terminationGracePeriodSeconds) $drain) -}}
    {{- fail (printf "%s.terminationGracePeriodSeconds is %d, below sidecar.drainSeconds (%d): answers under way would be cut; give at least %d" $at (int $pool.terminationGracePeriodSeconds) $drain $drain) -}}
  {{- end -}}
{{- end -}}
{{- if not (hasKey $pool "existing") -}}
  {{- $image := merge (deepCopy (default dict $pool.image)) (deepCopy $vendor.image) -}}
  {{- if and (eq $engine "vllm") (not $image.repository) -}}
    {{- fail (printf "%s.image.repository is empty, and so is vendors.%s.image.repository: name an image with vLLM for this vendor" $at $pool.vendor) -}}
  {{- end -}}
  {{- if and (eq $engine "vllm") (not $image.tag) -}}
    {{- fail (printf "%s.image.tag is empty, and so is vendors.%s.image.tag: name the version of the image" $at $pool.vendor) -}}
  {{- end -}}
{{- end -}}
{{- $ranks := mul (int (default 1 $pool.size)) (int (default 1 $pool.accelerators)) -}}
{{- $tensor := int (default $ranks $pool.tensorParallel) -}}
{{- if ne (mod $ranks $tensor) 0 -}}
  {{- fail (printf "%s.tensorParallel is %d with %d accelerators: give a divisor of them" $at $tensor $ranks) -}}
{{- end -}}
{{- if and (gt (int (default 1 $pool.size)) 1) (ne $engine "vllm") -}}
  {{- fail (printf "%s.size is %d with engine %s: servers over several pods are started for vllm only" $at (int $pool.size) $engine) -}}
{{- end -}}
{{- if and (gt (int (default 1 $pool.size)) 1) (ne $tensor (int $ranks)) -}}
  {{- fail (printf "%s.tensorParallel is %d with size %d: a server over several pods uses all its %d accelerators as one; leave it out" $at $tensor (int $pool.size) $ranks) -}}
{{- end -}}
{{- if and (dig "rdma" "count" 0 $pool | int) (not (default $vendor.rdmaResource (dig "rdma" "resource" "" $pool))) -}}
  {{- fail (printf "%s.rdma.count is %d but neither %s.rdma.resource nor vendors.%s.rdmaResource names the nodes' RDMA resource" $at (int $pool.rdma.count) $at $pool.vendor) -}}
{{- end -}}
{{- end -}}

{{- define "pdcoord.validateRoles" -}}
{{- if .root.Values.pd.enabled -}}
  {{- $roles := list -}}
  {{- range .model.pools -}}{{- $roles = append $roles .role -}}{{- end -}}
  {{- if not (or (has "decode" $roles) (has "both" $roles)) -}}
    {{- fail (printf "pd.enabled is true but no pool of %s (%s) decodes: set role: decode or both on one of %s.pools" .at .slug .at) -}}
  {{- end -}}
  {{- $v := .root.Values -}}
  {{- if not (or (has "prefill" $roles) (has "both" $roles)) -}}
    {{- fail (printf "pd.enabled is true but no pool of %s (%s) prefills: set role: prefill or both on one of %s.pools" .at .slug .at) -}}
  {{- end -}}
  {{- $lease := mul (int $v.pd.leaseSeconds) 1000 -}}
  {{- $deadline := int (dig "policy" "disaggregation" "transfer_deadline_ms" 0 .model) -}}
  {{- if ge $deadline (int $lease) -}}
    {{- fail (printf "%s.policy.disaggregation.transfer_deadline_ms is %d, not below pd.leaseSeconds (%d ms): KV would be gone while it is waited for" .at $deadline $lease) -}}
  {{- end -}}
  {{- include "pdcoord.validatePairs" . -}}
{{- end -}}
{{- if dig "policy" "disaggregation" "lease_ms" nil .model -}}
  {{- fail (printf "%s.policy.disaggregation.lease_ms is set: set pd.leaseSeconds, which the engines are told too" .at) -}}
{{- end -}}
{{- end -}}

{{- define "pdcoord.validateAdoption" -}}
{{- $v := .Values -}}
{{- $keys := dict -}}{{- $adopted := 0 -}}{{- $own := 0 -}}
{{- range $m, $model := $v.models -}}
  {{- range $p, $pool := $model.pools -}}
    {{- $at := printf "models[%d].pools[%d]" $m $p -}}
    {{- if hasKey $pool "existing" -}}
      {{- $adopted = add $adopted 1 -}}
      {{- if not $v.adopt.enabled -}}
        {{- fail (printf "%s.existing is set but adopt.enabled is false: set adopt.enabled, or leave existing out to have the servers created" $at) -}}
      {{- end -}}
      {{- range $key, $value := $pool.existing.matchLabels -}}{{- $_ := set $keys $key true -}}{{- end -}}
      {{- $hasSidecar := or (and $v.pd.enabled (ne $pool.role "prefill")) $v.auth.internalTls.secretName -}}
      {{- if and $hasSidecar $v.adopt.patches (not $pool.existing.deployment) -}}
        {{- fail (printf "%s.existing.deployment is not set: the patch that puts the sidecar in needs its name; set it, or adopt.patches: false" $at) -}}
      {{- end -}}
      {{- if eq (int (default 8000 $pool.existing.port)) (int (default 8001 $pool.existing.sidecarPort)) -}}
        {{- fail (printf "%s.existing.sidecarPort is %d, the port of the engine itself: give another" $at (int (default 8001 $pool.existing.sidecarPort))) -}}
      {{- end -}}
      {{- if hasKey $pool "autoscaling" -}}
        {{- fail (printf "%s.autoscaling is set on adopted servers, which this chart does not scale: leave it out" $at) -}}
      {{- end -}}
    {{- else -}}
      {{- $own = add $own 1 -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- if and $v.adopt.enabled (not $adopted) -}}
  {{- fail "adopt.enabled is true but no pool has existing: set models[].pools[].existing.matchLabels on those whose servers run already" -}}
{{- end -}}
{{- if and $adopted (not $v.adopt.podSelector) (or $own (ne (len $keys) 1)) -}}
  {{- fail "adopt.podSelector is empty, and no one label key selects all pools: set adopt.podSelector to a label selector of all their pods, such as \"app in (vllm-a, vllm-b)\"" -}}
{{- end -}}
{{- end -}}

{{- define "pdcoord.validateScaling" -}}
{{- $a := .Values.autoscaling -}}
{{- if and (eq $a.mode "keda") (not $a.keda.prometheusAddress) -}}
  {{- fail "autoscaling.mode is keda but autoscaling.keda.prometheusAddress is empty: give the address of Prometheus" -}}
{{- end -}}
{{- if and (ne $a.mode "keda") $a.keda.prometheusAddress -}}
  {{- fail (printf "autoscaling.keda.prometheusAddress is %q but autoscaling.mode is %s: set autoscaling.mode to keda, or leave the address out" $a.keda.prometheusAddress $a.mode) -}}
{{- end -}}
{{- $isMany := gt (len .Values.models) 1 -}}
{{- range $m, $model := .Values.models -}}
  {{- range $p, $pool := $model.pools -}}
    {{- $at := printf "models[%d].pools[%d].autoscaling" $m $p -}}
    {{- if hasKey $pool "autoscaling" -}}
      {{- if eq $a.mode "none" -}}
        {{- fail (printf "%s is set but autoscaling.mode is none: set it to hpa or keda, or leave %s out" $at $at) -}}
      {{- end -}}
      {{- if hasKey $pool "replicas" -}}
        {{- fail (printf "models[%d].pools[%d].replicas is %d beside autoscaling: leave it out, or the two would fight at each upgrade" $m $p (int $pool.replicas)) -}}
      {{- end -}}
      {{- if lt (int $pool.autoscaling.max) (int $pool.autoscaling.min) -}}
        {{- fail (printf "%s.max is %d, below %s.min (%d): give at least that" $at (int $pool.autoscaling.max) $at (int $pool.autoscaling.min)) -}}
      {{- end -}}
      {{- if lt (int $pool.autoscaling.min) 1 -}}
        {{- fail (printf "%s.min is 0: calls for a pool without servers are refused at once, so none would wait for it to grow from 0; give at least 1" $at) -}}
      {{- end -}}
      {{- if and (eq $a.mode "hpa") $isMany (not (regexMatch "^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$" $model.name)) -}}
        {{- fail (printf "models[%d].name is %q, which a label selector cannot hold, with several models and autoscaling.mode hpa: use keda" $m $model.name) -}}
      {{- end -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end -}}
